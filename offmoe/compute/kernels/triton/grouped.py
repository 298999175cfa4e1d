"""Many tokens: one matrix product per expert over the tokens that chose it, on tensor cores.

Weights are dequantized in registers to the dtype of the inputs, and rounded as a dequantized checkpoint would be.
Inputs stand lane by lane, [rows, weights per element, elements]: the inputs of the i-th weights of consecutive words
are then consecutive too, and words are taken apart without exchanges between threads.

Moves: an expert's weights from its slot to registers, once per block of up to BM of its tokens.
Bound: arithmetic, from some tens of tokens per expert on.
Must never: multiply one expert's tokens with another's weights. No block crosses the end of an expert's tokens.
"""

import triton
import triton.language as tl

from offmoe.compute.kernels.triton.elements import (
    activate,
    bias,
    elements,
    group_of,
    in_half_units,
    lane,
    row_numbers,
    scales,
)


@triton.jit
def weights(block, i: tl.constexpr, slot, W: tl.constexpr, rows, groups, like):
    """Weight i of every element, dequantized: [BN, BW] of the dtype of the pointer `like`."""
    value = lane(block, i, W)
    if W.offset != 0:
        value -= W.offset
    if W.kind != "float":
        value = in_half_units(value, W) * scales(slot, W, rows, groups)
    return value.to(like.dtype.element_ty)


@triton.jit
def inputs(x, row, inside, at, i: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """The inputs that weight i of elements `at` is multiplied with: [BM, BW] of x's dtype, 0 past the last token or
    element."""
    where = (row * W.cols + i * W.width)[:, None] + at[None, :]
    mask = inside[:, None]
    if W.width % BW != 0:
        mask = mask & (at < W.width)[None, :]
    return tl.load(x + where, mask=mask, other=0.0)


@triton.jit
def gate_up_blocks(
    slab,
    blocks,
    order,
    x,
    h,
    SHARING: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    GLU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """h [pairs in order, I], lane by lane as DOWN wants it, = glu(gate, up). grid: (blocks, blocks of BN rows).

    blocks int32 [n, 3]: where the slot starts, in units of 256 bytes; the first of up to BM consecutive places in
    `order`; the place after the expert's last. order int64 [pairs]: the input of a pair is row order // SHARING of x
    [n, H], which stands lane by lane.
    """
    VALUES: tl.constexpr = GATE.values
    block = blocks + tl.program_id(0) * 3
    slot = slab + tl.load(block).to(tl.int64) * 256
    place = tl.load(block + 1) + tl.arange(0, BM)
    inside = place < tl.load(block + 2)
    token = tl.load(order + place, mask=inside, other=0) // SHARING
    first_row = tl.program_id(1) * BN
    gate_rows, up_rows = row_numbers(first_row, GATE, BN), row_numbers(first_row, UP, BN)
    gate_sum = tl.zeros([BM, BN], dtype=tl.float32)
    up_sum = tl.zeros([BM, BN], dtype=tl.float32)
    for first in range(0, GATE.width, BW):
        at = first + tl.arange(0, BW)
        gate = elements(slot, GATE, gate_rows, at, BW)
        up = elements(slot, UP, up_rows, at, BW)
        groups = group_of(first, at, GATE, BW)
        for i in tl.static_range(VALUES):
            value = inputs(x, token, inside, at, i, GATE, BW)
            gate_weights = weights(gate, i, slot, GATE, gate_rows, groups, x)
            up_weights = weights(up, i, slot, UP, up_rows, groups, x)
            gate_sum = tl.dot(value, tl.trans(gate_weights), gate_sum, input_precision="ieee")
            up_sum = tl.dot(value, tl.trans(up_weights), up_sum, input_precision="ieee")
    inner = activate(gate_sum + bias(slot, GATE, gate_rows)[None, :], up_sum + bias(slot, UP, up_rows)[None, :], GLU)
    row = first_row + tl.arange(0, BN)
    where = (place.to(tl.int64) * DOWN.cols)[:, None] + (row % DOWN.values * DOWN.width + row // DOWN.values)[None, :]
    tl.store(h + where, inner.to(h.dtype.element_ty), mask=inside[:, None] & (row < GATE.rows)[None, :])


@triton.jit
def down_blocks(
    slab,
    blocks,
    h,
    out,
    DOWN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """out [pairs in order, H] = h times down; h as `gate_up_blocks` gives it. grid: (blocks, blocks of BN rows)."""
    VALUES: tl.constexpr = DOWN.values
    block = blocks + tl.program_id(0) * 3
    slot = slab + tl.load(block).to(tl.int64) * 256
    place = tl.load(block + 1) + tl.arange(0, BM)
    inside = place < tl.load(block + 2)
    first_row = tl.program_id(1) * BN
    rows = row_numbers(first_row, DOWN, BN)
    sums = tl.zeros([BM, BN], dtype=tl.float32)
    for first in range(0, DOWN.width, BW):
        at = first + tl.arange(0, BW)
        down = elements(slot, DOWN, rows, at, BW)
        groups = group_of(first, at, DOWN, BW)
        for i in tl.static_range(VALUES):
            value = inputs(h, place.to(tl.int64), inside, at, i, DOWN, BW)
            down_weights = weights(down, i, slot, DOWN, rows, groups, h)
            sums = tl.dot(value, tl.trans(down_weights), sums, input_precision="ieee")
    sums += bias(slot, DOWN, rows)[None, :]
    row = first_row + tl.arange(0, BN)
    where = (place.to(tl.int64) * DOWN.rows)[:, None] + row[None, :]
    tl.store(out + where, sums.to(out.dtype.element_ty), mask=inside[:, None] & (row < DOWN.rows)[None, :])

"""Few tokens: every (token, expert) pair reads its expert's weights once.

One launch computes gate, up and activation, another one down, over all pairs of a layer. Pairs are the fastest axis of
the grid, so programs that read the same rows of one expert run at the same time and share them in the L2 cache.

Moves: the bytes of the chosen experts from their slots to registers, where they are dequantized.
Bound: the device's memory bandwidth.
Must never: write a row of another pair.
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
def inputs(x, at, i: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """The inputs that weight i of elements `at` [BW] is multiplied with: float32 [BW], 0 beyond the end."""
    if W.width % BW == 0:
        value = tl.load(x + at * W.values + i)
    else:
        value = tl.load(x + at * W.values + i, mask=at < W.width, other=0.0)
    return in_half_units(value.to(tl.float32), W)


@triton.jit
def settled(part, total, slot, W: tl.constexpr, rows, groups):
    """The sums [BN, BW] of weight * input, from `part` [BN, BW], sums of lane * input, and `total` [BW], of inputs."""
    if W.offset != 0:
        part -= W.offset * total[None, :]
    if W.kind != "float":
        part *= scales(slot, W, rows, groups)
    return part


@triton.jit
def place_of(places, ids, pair, EXPERTS: tl.constexpr):
    """Where the slot of a pair's expert starts, in units of 256 bytes. places has one entry per pair; with `ids`, one
    per expert: -1 is an expert without a slot, and the result is -2 if the pair's id is no expert's."""
    if ids is None:
        place = tl.load(places + pair)
    else:
        expert = tl.load(ids + pair)
        place = tl.load(places + expert, mask=(expert >= 0) & (expert < EXPERTS), other=-2)
    return place


@triton.jit
def gate_up_rows(
    slab,
    places,
    order,
    x,
    h,
    SHARING: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    GLU: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    ids=None,
    EXPERTS: tl.constexpr = 0,
):
    """h [pairs, I] float32 = glu(gate, up) of x [n, H]. grid: (pairs, blocks of BN rows).

    places int32 [pairs]: where the slot of the pair's expert starts, in units of 256 bytes. order int64 [pairs]: its
    input is row order // SHARING; None: row 0, for all. With ids int64 [pairs], places has one entry for each of
    EXPERTS experts; a pair without a place is computed from the first slot, and `routed.down_reduced` ignores its row.
    """
    VALUES: tl.constexpr = GATE.values
    pair, block = tl.program_id(0), tl.program_id(1)
    slot = slab + tl.maximum(place_of(places, ids, pair, EXPERTS), 0).to(tl.int64) * 256
    if order is not None:
        x += tl.load(order + pair) // SHARING * GATE.cols
    gate_rows, up_rows = row_numbers(block * BN, GATE, BN), row_numbers(block * BN, UP, BN)
    gate_sum = tl.zeros([BN, BW], dtype=tl.float32)
    up_sum = tl.zeros([BN, BW], dtype=tl.float32)
    for first in range(0, GATE.width, BW):
        at = first + tl.arange(0, BW)
        gate = elements(slot, GATE, gate_rows, at, BW)
        up = elements(slot, UP, up_rows, at, BW)
        gate_part = tl.zeros([BN, BW], dtype=tl.float32)
        up_part = tl.zeros([BN, BW], dtype=tl.float32)
        total = tl.zeros([BW], dtype=tl.float32)
        for i in tl.static_range(VALUES):
            value = inputs(x, at, i, GATE, BW)
            gate_part += lane(gate, i, GATE) * value[None, :]
            up_part += lane(up, i, UP) * value[None, :]
            total += value
        groups = group_of(first, at, GATE, BW)
        gate_sum += settled(gate_part, total, slot, GATE, gate_rows, groups)
        up_sum += settled(up_part, total, slot, UP, up_rows, groups)
    whole_gate = tl.sum(gate_sum, axis=1) + bias(slot, GATE, gate_rows)
    whole_up = tl.sum(up_sum, axis=1) + bias(slot, UP, up_rows)
    row = block * BN + tl.arange(0, BN)
    tl.store(h + pair.to(tl.int64) * GATE.rows + row, activate(whole_gate, whole_up, GLU), mask=row < GATE.rows)


@triton.jit
def down_block(slot, h, block, DOWN: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """Rows block * BN + [0, BN) of h [I] times down, in float32 [BN]."""
    VALUES: tl.constexpr = DOWN.values
    rows = row_numbers(block * BN, DOWN, BN)
    sums = tl.zeros([BN, BW], dtype=tl.float32)
    for first in range(0, DOWN.width, BW):
        at = first + tl.arange(0, BW)
        down = elements(slot, DOWN, rows, at, BW)
        part = tl.zeros([BN, BW], dtype=tl.float32)
        total = tl.zeros([BW], dtype=tl.float32)
        for i in tl.static_range(VALUES):
            value = inputs(h, at, i, DOWN, BW)
            part += lane(down, i, DOWN) * value[None, :]
            total += value
        sums += settled(part, total, slot, DOWN, rows, group_of(first, at, DOWN, BW))
    return tl.sum(sums, axis=1) + bias(slot, DOWN, rows)


@triton.jit
def down_rows(slab, places, h, out, DOWN: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """out [pairs, H] = h [pairs, I] times down. grid: (pairs, blocks of BN rows)."""
    pair, block = tl.program_id(0), tl.program_id(1)
    slot = slab + tl.load(places + pair).to(tl.int64) * 256
    value = down_block(slot, h + pair.to(tl.int64) * DOWN.cols, block, DOWN, BN, BW)
    row = block * BN + tl.arange(0, BN)
    tl.store(out + pair.to(tl.int64) * DOWN.rows + row, value.to(out.dtype.element_ty), mask=row < DOWN.rows)

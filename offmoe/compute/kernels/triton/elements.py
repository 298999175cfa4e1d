"""Blocks of a weight as they stand in a slot, and the numbers in them; shared by all kernels.

A weight costs three instructions: its bits are shifted and masked into the mantissa or exponent of a float32. A
conversion instruction would have a fraction of that rate. The offset and the power of two that remain are taken out
once per group:

    int4    16 + nibble           in the four high bits of the mantissa of 16.0
    uint8   256 + byte            the byte, in the eight high bits of the mantissa of 256.0
    mxfp4   value * 2**-126       E2M1 as float32: same fields, subnormals included, another bias
    fp8     value * 2**-120       E4M3 alike; its NaN, 0x7F, reads as 480

Moves: elements (floats, FP8 bytes, or int32 words of 4 or 8 weights) from the slot to registers.
Bound: the device's memory, but not by much: a GPU of 3.3 TB/s with 132 multiprocessors of 128 lanes brings 30 int4
weights per clock to each multiprocessor.
Must never: read outside a weight, except masked.
"""

import triton
import triton.language as tl


@triton.jit
def elements(slot, W: tl.constexpr, rows, at, BW: tl.constexpr):
    """Elements `at` [BW] of `rows` [BN] of the parameter: [BN, BW]. Beyond the end of a row they are 0."""
    base = (slot + W.at).to(tl.pointer_type(tl.dtype(W.element)), bitcast=True)
    where = rows[:, None] * W.row_stride + at[None, :] * W.col_stride
    whole = W.width % BW == 0
    return tl.load(base + where) if whole else tl.load(base + where, mask=(at < W.width)[None, :], other=0)


@triton.jit
def lane(block, i: tl.constexpr, W: tl.constexpr):
    """Weight i of every element as float32, times a power of two (`in_half_units`), or plus `W.offset`."""
    if W.kind == "float":
        weight = block.to(tl.float32)
    elif W.kind == "fp8":
        byte = block.to(tl.int32)
        weight = (((byte & 0x80) << 24) | ((byte & 0x7F) << 20)).to(tl.float32, bitcast=True)
    elif W.kind == "mxfp4":
        nibble = block >> (4 * i)
        weight = (((nibble & 8) << 28) | ((nibble & 7) << 22)).to(tl.float32, bitcast=True)
    elif W.kind == "uint8":
        byte = (block >> (8 * i)) & 0xFF
        weight = ((byte << 15) | 0x43800000).to(tl.float32, bitcast=True)
    else:
        nibble = (block >> (4 * i)) & 15
        weight = ((nibble << 19) | 0x41800000).to(tl.float32, bitcast=True)
    return weight


@triton.jit
def in_half_units(value, W: tl.constexpr):
    """float32 times the square root of the power of two that `lane` omits. Scales get one factor, inputs or weights the
    other: both at once can overflow.
    """
    if W.kind == "mxfp4":
        value *= 9223372036854775808.0  # 2**63
    elif W.kind == "fp8":
        value *= 1152921504606846976.0  # 2**60
    return value


@triton.jit
def group_of(first, at, W: tl.constexpr, BW: tl.constexpr):
    """Indices of the scales of elements `at` = first + [0, BW): [BW], or [1] where all have the same one."""
    if W.groups == 1:
        groups = tl.arange(0, 1)
    elif W.group % (BW * W.values) == 0:
        groups = first * W.values // W.group + tl.arange(0, 1)
    else:
        groups = tl.minimum(at * W.values // W.group, W.groups - 1)
    return groups


@triton.jit
def scales(slot, W: tl.constexpr, rows, groups):
    """Scales of `groups` [n], in half units: float32 [BN, n]."""
    base = (slot + W.scale_at).to(tl.pointer_type(tl.dtype(W.scale)), bitcast=True)
    scale = tl.load(base + (rows // W.scale_rows * W.groups)[:, None] + groups[None, :])
    if W.scale == "uint8":  # exponents of two; 0 is 2**-127, which is subnormal
        scale = tl.maximum(scale.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    return in_half_units(scale.to(tl.float32), W)


@triton.jit
def row_numbers(first, W: tl.constexpr, BN: tl.constexpr):
    """Rows of the parameter that are rows first + [0, BN) of the weight; past its end, the last one again."""
    row = first + tl.arange(0, BN)
    if W.rows % BN != 0:
        row = tl.minimum(row, W.rows - 1)
    return W.first + row * W.step


@triton.jit
def bias(slot, W: tl.constexpr, rows):
    """float32 [BN]; [1] of 0 without one."""
    if W.bias == "":
        value = tl.zeros([1], dtype=tl.float32)
    else:
        value = tl.load((slot + W.bias_at).to(tl.pointer_type(tl.dtype(W.bias)), bitcast=True) + rows).to(tl.float32)
    return value


@triton.jit
def activate(gate, up, GLU: tl.constexpr):
    """`offmoe.compute.kernels.cpu.Glu` on float32; comparisons keep NaN."""
    if GLU.kind == "silu":
        inner = gate * tl.sigmoid(gate) * up
    elif GLU.kind == "gelu_tanh":  # (1 + tanh(y)) / 2 is sigmoid(2 y)
        inner = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gate = tl.where(gate > GLU.limit, GLU.limit, gate)
        up = tl.where(up > GLU.limit, GLU.limit, tl.where(up < -GLU.limit, -GLU.limit, up))
        inner = gate * tl.sigmoid(GLU.alpha * gate) * (up + 1)
    return inner

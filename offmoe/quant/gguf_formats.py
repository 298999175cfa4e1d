"""The quantized types of GGUF files: blocks of 32 or 256 values, each with one or several scales.

Values are formed in float32 in the order of ggml's reference (dequantize_row_* of ggml-quants.c without contraction,
and the gguf package's quants.py), so they have its bits. They are rounded once, to the dtype of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from offmoe.quant.codec import Spec, expect
from offmoe.storage.gguf_types import BLOCK_TYPES, BlockType

BLOCKS = "blocks"
"""The one component of a weight."""


@dataclass(frozen=True)
class GgufBlocks:
    """A weight of one GGUF type. Decodes to [rows, cols].

    Components: blocks uint8 [rows, bytes of a row].

    Args:
        type: the number of the type in `BLOCK_TYPES`.
    """

    type: int
    required = frozenset({BLOCKS})

    @property
    def block(self) -> BlockType:
        return BLOCK_TYPES[self.type]

    @property
    def name(self) -> str:
        return f"gguf {self.block.name}"

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        blocks, of = specs[BLOCKS], self.block
        expect(blocks.dtype == torch.uint8 and len(blocks.shape) == 2, f"its blocks are {blocks}")
        rows, nbytes = blocks.shape
        expect(nbytes % of.nbytes == 0, f"its rows of {nbytes} bytes are not whole blocks of {of.nbytes}")
        return rows, nbytes // of.nbytes * of.values

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        rows = raw[BLOCKS]
        blocks = rows.reshape(-1, self.block.nbytes)  # [n, bytes of a block]
        out = torch.empty((len(blocks), self.block.values), dtype=torch.float32, device=rows.device)
        if len(blocks):
            DECODERS[self.type](blocks, out)
        return out.view(len(rows), rows.shape[1] // self.block.nbytes * self.block.values).to(dtype)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of every block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _put_nibbles(octets: torch.Tensor, out: torch.Tensor) -> None:
    """Write low halves, then high halves: octets [n, k, w] -> out [n, k, 2, w]."""
    out[:, :, 0].copy_(octets & 15)
    out[:, :, 1].copy_(octets >> 4)


def _fields(octets: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Cut bytes into `count` fields of `bits` bits, lowest first: uint8 [..., w] -> [..., count, w]."""
    shifts = torch.arange(0, count * bits, bits, dtype=torch.uint8, device=octets.device).view(count, 1)
    return (octets.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)


def _scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack the 12 bytes of Q4_K and Q5_K: eight scales and eight minima of 6 bits, uint8 [n, 8] each."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], 1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], 1)
    return scales, minima


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _put_nibbles(blocks[:, 2:].unsqueeze(1), out.view(-1, 1, 2, 16))
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _put_nibbles(blocks[:, 4:].unsqueeze(1), out.view(-1, 1, 2, 16))
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _put_five_bits(blocks: torch.Tensor, at: int, out: torch.Tensor) -> None:
    """Codes of 5 bits: their fifth bits from byte `at`, their nibbles four bytes later."""
    fifth = _fields(blocks[:, at : at + 4].unsqueeze(-1), 8, 1).view(-1, 32)  # [n, 4, 8, 1] -> [n, 32]
    low = blocks[:, at + 4 :]
    out.copy_(torch.cat([low & 15, low >> 4], 1) | (fifth << 4))


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _put_five_bits(blocks, 2, out)
    out.sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _put_five_bits(blocks, 4, out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


def _q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    packed = blocks[:, :16]  # a scale and a minimum of 4 bits for each 16 values
    out.view(-1, 2, 4, 32).copy_(_fields(blocks[:, 16:80].reshape(-1, 2, 32), 4, 2))
    groups = out.view(-1, 16, 16)
    groups.mul_((_half(blocks, 80) * (packed & 15).float()).unsqueeze(-1))
    groups.sub_((_half(blocks, 82) * (packed >> 4).float()).unsqueeze(-1))


def _q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    packed = blocks[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)  # [n, 16]
    high = _fields(packed[:, 8:], 4, 2).view(-1, 16)
    scales = (low | (high << 4)).to(torch.int8) - 32
    codes = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 4, 2).view(-1, 8, 32)
    third = _fields(blocks[:, :32].unsqueeze(1), 8, 1).view(-1, 8, 32)
    out.view(-1, 8, 32).copy_((codes | (third << 2)).to(torch.int8) - 4)
    out.view(-1, 16, 16).mul_((_half(blocks, 108) * scales.float()).unsqueeze(-1))


def _scale_eighths(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """Apply the scales and minima of Q4_K and Q5_K to the codes in `out`, in place."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    groups = out.view(-1, 8, 32)
    groups.mul_((_half(blocks, 0) * scales.float()).unsqueeze(-1))
    groups.sub_((_half(blocks, 2) * minima.float()).unsqueeze(-1))


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _put_nibbles(blocks[:, 16:].view(-1, 4, 32), out.view(-1, 4, 2, 32))
    _scale_eighths(blocks, out)


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    fifth = _fields(blocks[:, 16:48].unsqueeze(1), 8, 1).view(-1, 8, 32)
    codes = torch.empty_like(fifth)
    _put_nibbles(blocks[:, 48:].view(-1, 4, 32), codes.view(-1, 4, 2, 32))
    out.view(-1, 8, 32).copy_(codes | (fifth << 4))
    _scale_eighths(blocks, out)


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    codes = torch.cat([low & 15, low >> 4], 2).view(-1, 2, 4, 32)
    out.view(-1, 2, 4, 32).copy_(codes | (_fields(high, 4, 2) << 4))
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # [n, 16]
    out.sub_(32).view(-1, 16, 16).mul_(scales.unsqueeze(-1))


LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of the nibbles of IQ4_NL and IQ4_XS (kvalues_iq4nl of ggml-common.h)."""


def _put_levels(octets: torch.Tensor, levels: tuple[int, ...], out: torch.Tensor) -> None:
    """Look nibbles up: octets [n, k, w] -> out [n, k, 2, w]."""
    table = torch.tensor(levels, dtype=torch.float32, device=octets.device)
    for half, codes in enumerate((octets & 15, octets >> 4)):
        out[:, :, half].copy_(table.index_select(0, codes.flatten().int()).view(octets.shape))


def _iq4_nl(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _put_levels(blocks[:, 2:].unsqueeze(1), LEVELS, out.view(-1, 1, 2, 16))
    out.mul_(_half(blocks, 0))


def _iq4_xs(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low = _fields(blocks[:, 4:8].unsqueeze(-1), 2, 4).view(-1, 8)
    high = _fields(blocks[:, 2:4].unsqueeze(-1), 4, 2).view(-1, 8)
    scales = (low | (high << 4)).to(torch.int8) - 32
    _put_levels(blocks[:, 8:].view(-1, 8, 16), LEVELS, out.view(-1, 8, 2, 16))
    out.view(-1, 8, 32).mul_((_half(blocks, 0) * scales.float()).unsqueeze(-1))


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of MXFP4's nibbles (kvalues_mxfp4); the scale is half the power of two. Nibble 8 is +0, not -0."""


def _mxfp4(blocks: torch.Tensor, out: torch.Tensor) -> None:
    exponents = blocks[:, 0].int()
    # half of 2**(e - 127) as float32 bits; the two smallest are subnormal
    bits = torch.where(exponents < 2, 0x200000 << exponents.clamp(max=1), (exponents - 1) << 23)
    _put_levels(blocks[:, 1:].unsqueeze(1), E2M1, out.view(-1, 1, 2, 16))
    out.mul_(bits.int().view(torch.float32).unsqueeze(-1))


DECODERS: dict[int, Callable[[torch.Tensor, torch.Tensor], None]] = {
    2: _q4_0,
    3: _q4_1,
    6: _q5_0,
    7: _q5_1,
    8: _q8_0,
    10: _q2_k,
    11: _q3_k,
    12: _q4_k,
    13: _q5_k,
    14: _q6_k,
    20: _iq4_nl,
    23: _iq4_xs,
    39: _mxfp4,
}
"""By type: blocks uint8 [n, bytes of a block] into float32 [n, values of a block]."""
assert DECODERS.keys() == BLOCK_TYPES.keys(), "every type that headers accept has a decoder"

"""bitsandbytes in 4 bits, nf4 and fp4: each code is an index into a table of 16 values, scaled per block.

The scale is the largest magnitude of the block (absmax). With double quantization the magnitudes are codes too: indices
into a table of 256 values, scaled per block of blocks and shifted by an offset. Every weight has its own tables in the
checkpoint. Products are formed in float32, rounded to the dtype that was quantized, then cast, as in bitsandbytes 0.50
(backends/default/ops.py dequantize_4bit, functional.py QuantState).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offmoe.quant.codec import Spec, expect


@dataclass(frozen=True)
class Blockwise4Bit:
    """One 4-bit weight of bitsandbytes.

    Components: weight (any dtype; a byte holds two codes, the first in its high half), absmax [blocks] (float32, or
    uint8 if nested), quant_map float32 [16], offset float32 []. If nested also nested_absmax float32 [blocks of blocks]
    and nested_quant_map float32 [256].

    Args:
        dense: shape of the weight.
        block: weights per block.
        stored: the dtype that was quantized.
        nested: magnitudes per block of blocks, with double quantization; else None.
        kind: "nf4" or "fp4".
    """

    dense: tuple[int, ...]
    block: int
    stored: torch.dtype
    nested: int | None = None
    kind: str = "nf4"

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.kind}"

    @property
    def required(self) -> frozenset[str]:
        more = ("nested_absmax", "nested_quant_map") if self.nested else ()
        return frozenset({"weight", "absmax", "quant_map", "offset", *more})

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        numel = torch.Size(self.dense).numel()
        weight = specs["weight"]
        octets = torch.Size(weight.shape).numel() * weight.dtype.itemsize
        blocks = -(-numel // self.block)
        expect(octets == -(-numel // 2), f"{octets} bytes do not hold {list(self.dense)} codes of 4 bits")
        wanted = {"absmax": Spec((blocks,), torch.uint8 if self.nested else torch.float32)}
        wanted |= {"quant_map": Spec((16,), torch.float32), "offset": Spec((), torch.float32)}
        if self.nested:
            wanted["nested_absmax"] = Spec((-(-blocks // self.nested),), torch.float32)
            wanted["nested_quant_map"] = Spec((256,), torch.float32)
        for component, spec in wanted.items():
            actual = specs[component]
            expect(actual == spec, f"{component} is {actual.dtype} {list(actual.shape)}, not {spec.dtype} {spec.shape}")
        return self.dense

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        numel = torch.Size(self.dense).numel()
        absmax = raw["absmax"]
        if self.nested:
            scale = raw["nested_absmax"].repeat_interleave(self.nested)[: len(absmax)]
            absmax = raw["nested_quant_map"][absmax.int()] * scale + raw["offset"]
        octets = raw["weight"].reshape(-1).view(torch.uint8)
        codes = torch.stack((octets >> 4, octets & 15), dim=-1).flatten()[:numel]
        weight = raw["quant_map"][codes.int()]  # float32 [numel]
        whole = numel // self.block
        weight[: whole * self.block].view(whole, -1).mul_(absmax[:whole, None])
        weight[whole * self.block :].mul_(absmax[whole:])
        return weight.view(self.dense).to(self.stored).to(dtype)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def read_state(octets: bytes) -> tuple[Blockwise4Bit, float]:
    """Read the JSON that bitsandbytes stores with a weight (its quant_state).

    Returns:
        The codec, and the offset of the magnitudes.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        state = json.loads(octets)
        dense = tuple(int(size) for size in state["shape"])
        block, nested = int(state["blocksize"]), state.get("nested_blocksize")
        kind, stored = state["quant_type"], DTYPES[state["dtype"]]
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its quant_state is not one of bitsandbytes ({error!r})") from error
    expect(kind in ("nf4", "fp4"), f"its quant_state names the type {kind!r}")
    expect(
        block > 0 and len(dense) > 0 and min(dense) >= 0 and (nested is None or int(nested) > 0),
        f"its quant_state names blocks of {block} and {nested} for {dense}",
    )
    return Blockwise4Bit(dense, block, stored, None if nested is None else int(nested), kind), offset

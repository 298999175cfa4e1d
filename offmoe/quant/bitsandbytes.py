"""bitsandbytes in 4 bits, nf4 and fp4: codes into a table of 16 values, a largest magnitude for every block.

What moves: half a byte per weight and its share of a block's magnitude in, the matrix out by way of float32; bounded by
memory. With double quantization the magnitudes are codes too: into a table of 256 values, scaled per block of blocks
and shifted. Products are formed in float32 and rounded to the dtype that was quantized, then cast, as bitsandbytes
0.50 does (backends/default/ops.py dequantize_4bit, functional.py QuantState). Must never take a table for granted: it
comes with every weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offmoe.quant.codec import Spec, expect


@dataclass(frozen=True)
class Blockwise4Bit:
    """One weight of bitsandbytes: `dense` is its shape, `block` and `nested` count elements of a block.

    Components: weight (any dtype; a byte holds two codes, the first in the high half), absmax [blocks], quant_map
    float32 [16], offset float32 []; and if `nested`, whose absmax is uint8, nested_absmax float32 and nested_quant_map
    float32 [256]. stored: the dtype that was quantized.
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
            found = specs[component]
            expect(found == spec, f"{component} is {found.dtype} {list(found.shape)}, not {spec.dtype} {spec.shape}")
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
    """The JSON that bitsandbytes stores beside a weight -> (codec, offset of the magnitudes); ValueError if it is not
    one.
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

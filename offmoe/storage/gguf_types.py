"""The element types of GGUF tensors: which dtype, or how many values in blocks of how many bytes.

Numbers, names and sizes are those of `enum ggml_type` and the block structs of ggml (ggml.h, ggml-common.h). A row of
blocks is a row of the matrix: no block spans two rows. What a block's bytes mean is quant/gguf_formats.py's subject.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class BlockType(NamedTuple):
    """A quantized type."""

    name: str
    values: int
    """Consecutive values of a row in one block."""
    nbytes: int
    """Bytes of one block."""


BLOCK_TYPES: dict[int, BlockType] = {
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    39: BlockType("MXFP4", 32, 17),
}
"""The quantized types that offmoe decodes, by number."""

PLAIN_TYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
"""The types that are dtypes of torch, by number."""

OTHER_TYPES: dict[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}
"""The names of types that offmoe does not decode, by number."""


def type_name(number: int) -> str:
    """The name of a type, for messages."""
    if number in BLOCK_TYPES:
        return BLOCK_TYPES[number].name
    if number in PLAIN_TYPES:
        return str(PLAIN_TYPES[number]).removeprefix("torch.")
    return OTHER_TYPES.get(number, f"of the unknown type {number}")

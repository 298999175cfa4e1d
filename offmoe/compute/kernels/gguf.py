"""GGUF weights decoded on the CPU by the C decoders: the bits of `GgufBlocks.decode`, several times as fast.

Moves: the blocks of one weight once in, the dense weight once out, divided among threads.
Bound: memory bandwidth, or 1 to 6 GB/s of blocks per core by type.
Must never: decode a tensor that is not in RAM, or to other bits than torch's definition.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from offmoe.compute.kernels.library import SCALE_TYPES, DecodingStruct, Library, Threads
from offmoe.quant.codec import Codec
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks

OUT_TYPES = (torch.bfloat16, torch.float32)
"""The dtypes that the decoders write."""


class GgufDecoder:
    """Decodes weights in RAM; other formats and dtypes are left to their codecs."""

    def __init__(self, library: Library, threads: int, variant: str | None = None) -> None:
        """Start the threads.

        Args:
            library: the C kernels.
            threads: their number.
            variant: one of `library.variants`; None: the fastest.
        """
        self._calls, self._variant = library.calls, library.variant(variant)
        self._threads = Threads(library, threads)

    def __call__(self, codec: Codec, raw: Mapping[str, torch.Tensor], out: torch.Tensor) -> bool:
        """Decode one weight into `out`, [rows, cols] in RAM.

        Returns:
            Whether it was decoded. False: the codec has to do it.
        """
        if not isinstance(codec, GgufBlocks) or out.dtype not in OUT_TYPES or not out.is_contiguous():
            return False
        blocks = raw[BLOCKS]
        if not blocks.is_contiguous():
            return False
        count = blocks.numel() // codec.block.nbytes
        assert count * codec.block.values == out.numel(), "the output has another size than the weight"
        struct = DecodingStruct(
            blocks=blocks.data_ptr(),
            out=out.data_ptr(),
            count=count,
            block_bytes=codec.block.nbytes,
            type=codec.type,
            out_type=SCALE_TYPES[str(out.dtype).removeprefix("torch.")],
        )
        self._calls.offmoe_decode(self._threads.handle, self._variant, ctypes.byref(struct))
        return True

    def close(self) -> None:
        """End the threads; idempotent."""
        self._threads.close()

"""Quantized dense weights that the CPU's kernels read as the checkpoint stores them (`exactness="numeric"`).

Decoded to bf16, a weight of 4.5 bits takes 3.6 times the memory, and a token reads all of it. Such a weight goes into
the kernels' tiles instead, if these hold exactly the values that its codec decodes to: GGUF and FP8. Codecs of integers
round every weight to the dtype of its scale, which kernels do not: in attention that changed logits by 1 % of their
norm, twice what it does in experts.

Moves: a weight's bytes once, from the shards into tiles, in the calling thread.
Bound: the disk; tiles take 2.5 GB/s or more of one core.
Must never: guess. A weight that is made of several tensors, or of changed values, is decoded as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from offmoe.compute.gated import DTYPE_OF
from offmoe.compute.tile_placement import put_tiles
from offmoe.device.pages import empty_tensor
from offmoe.errors import UnsupportedModelError
from offmoe.hf.catalog.dense_view import DenseView, Encoded
from offmoe.hf.gguf.values import MovedRows
from offmoe.quant.float_formats import ScaledFloat
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks
from offmoe.quant.kernel_words import format_of
from offmoe.quant.packed_weight import PackedWeight, WeightFormat
from offmoe.storage.checkpoint import Checkpoint, read_tensor

EXACT = (GgufBlocks, ScaledFloat)
"""Codecs whose values, in float32, are the products that kernels form."""


class StoredWeight(NamedTuple):
    """One quantized matrix of a checkpoint."""

    encoded: Encoded
    format: WeightFormat
    """In which the kernels read it."""
    rows: MovedRows | None
    """Puts its rows into the model's order; None: they stand in it."""

    def read(self, checkpoint: Checkpoint) -> PackedWeight:
        """The weight in tiles.

        Args:
            checkpoint: the one whose tensors `encoded` names.

        Raises:
            CheckpointError: its bytes are not there, or say that the kernels cannot read them.
        """
        raw = {part: read_tensor(checkpoint, name) for part, name in self.encoded.names.items()}
        if self.rows is not None:
            raw[BLOCKS] = self.rows(raw[BLOCKS]).contiguous()
        rows, cols = self.encoded.shape
        planes = self.format.params("", rows, cols, tiled=True)
        memory = {plane: empty_tensor(shape, dtype) for plane, (dtype, shape) in planes.items()}
        weight = PackedWeight.of(self.format, "", memory)
        put_tiles(self.encoded.encoding.codec, raw, weight)
        return weight


def stored_weights(view: DenseView, decoded: Mapping[str, str]) -> dict[str, StoredWeight]:
    """The weights that the kernels can read, by the names of `decoded`.

    Args:
        view: the checkpoint.
        decoded: name of a parameter -> its tensor in `view`.
    """
    found = {name: _stored_weight(view, tensor) for name, tensor in decoded.items()}
    return {name: weight for name, weight in found.items() if weight is not None}


def _stored_weight(view: DenseView, name: str) -> StoredWeight | None:
    rows = None
    if name in view.rebuilt:
        sources, undo = view.rebuilt[name]
        if len(sources) > 1 or not (undo is None or isinstance(undo, MovedRows)):
            return None
        name, rows = sources[0], undo
    encoded = view.encoded.get(name)
    if encoded is None or encoded.stacked is not None or len(encoded.shape) != 2:
        return None
    codec, specs = encoded.encoding.codec, dict(encoded.encoding.components)
    if not isinstance(codec, EXACT):
        return None
    dtype = specs[next((part for part in DTYPE_OF if part in specs), next(iter(specs)))].dtype
    how = format_of(codec, encoded.shape[1], dtype)
    if isinstance(how, str):
        return None
    with suppress(UnsupportedModelError):
        how.check(name, *encoded.shape)
        return StoredWeight(encoded, how, rows)
    return None

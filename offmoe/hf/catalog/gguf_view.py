"""A GGUF checkpoint under the names, shapes and values that the same model has in transformers.

Experts stay as they are in the file: one tensor holds the same matrix of all experts, and a row of it is one expert's
blocks. Every other weight is decoded when it is loaded, and what the converter did to its values is undone. Nothing is
read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from offmoe.errors import CheckpointError
from offmoe.hf.catalog.dense_view import DECODED, DenseView, Encoded, Rebuilt
from offmoe.hf.gguf import architecture
from offmoe.hf.gguf.architectures import GgufModel
from offmoe.hf.upstream import WeightConverter
from offmoe.quant.codec import Encoding, Spec
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.gguf_types import BLOCK_TYPES
from offmoe.storage.layout import TensorInfo


class OpenedView(NamedTuple):
    """A checkpoint by dense names, and what makes the model's parameters of them."""

    view: DenseView
    converters: Sequence[WeightConverter] | None = None
    """In place of those that transformers has for the model; None: transformers' own."""
    is_complete: bool = False
    """Whether every tensor must become a parameter of the model."""


def open_view(checkpoint: Checkpoint, config: PreTrainedConfig) -> OpenedView:
    """The view of a checkpoint.

    Args:
        checkpoint: the tensors at rest.
        config: the model's transformers config.

    Raises:
        OffmoeError: what `DenseView.of` raises, or a tensor of a GGUF file that offmoe does not know.
    """
    if checkpoint.gguf is None:
        return OpenedView(DenseView.of(checkpoint, config))
    model = GgufModel.of(checkpoint.gguf)
    reading = _Reading(checkpoint)
    for rebuilt in model.rebuilt(config):
        reading.add(rebuilt)
    view = DenseView(checkpoint, reading.tensors, reading.encoded, reading.renamed, reading.rebuilt)
    return OpenedView(view, model.how.converters(), is_complete=True)


class _Reading:
    """Collects the parts of a `DenseView`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors: dict[str, TensorInfo] = {}
        self.encoded: dict[str, Encoded] = {}
        self.renamed: dict[str, str] = {}
        self.rebuilt: dict[str, Rebuilt] = {}
        self.encodings: dict[Encoding, Encoding] = {}  # one object for all equal ones

    def add(self, rebuilt: architecture.Rebuilt) -> None:
        """Add one tensor of the model."""
        infos = [self._info(source) for source in rebuilt.sources]
        first = infos[0]
        if rebuilt.expert:
            encoded = self._encoded(rebuilt.sources[0])
            if encoded is None:
                self.renamed[rebuilt.name] = rebuilt.sources[0]
            else:
                self.encoded[rebuilt.name] = encoded
            self.tensors[rebuilt.name] = first
            return
        for source in rebuilt.sources:
            encoded = self._encoded(source)
            if encoded is not None:
                self.encoded[source] = encoded
        if rebuilt.undo is not None:
            first = replace(first, shape=self._undone(rebuilt, infos))
        self.tensors[rebuilt.name] = first
        self.rebuilt[rebuilt.name] = Rebuilt(rebuilt.sources, rebuilt.undo)

    def _undone(self, rebuilt: architecture.Rebuilt, infos: Sequence[TensorInfo]) -> tuple[int, ...]:
        """The shape of a rebuilt weight."""
        assert rebuilt.undo is not None
        try:
            value = rebuilt.undo(*[torch.empty(info.shape, device="meta") for info in infos])
        except (RuntimeError, ValueError, IndexError) as error:  # of a shape that does not go with the configuration
            where = self.checkpoint.shards[infos[0].shard]
            raise CheckpointError(
                f"{where}: tensor {rebuilt.sources[0]!r} of shape {list(infos[0].shape)} does not fit the "
                "configuration; config.json and the file are not of the same model"
            ) from error
        return tuple(value.shape)

    def _encoded(self, name: str) -> Encoded | None:
        """How a tensor of the file is quantized; None if it is not."""
        assert self.checkpoint.gguf is not None
        kind, raw = self.checkpoint.gguf.types[name], self.checkpoint.tensors[name].shape
        if kind not in BLOCK_TYPES:
            return None
        codec, spec = GgufBlocks(kind), Spec(raw[-2:] if len(raw) > 1 else (1, *raw), torch.uint8)
        encoding = Encoding(codec, ((BLOCKS, spec),))
        encoding = self.encodings.setdefault(encoding, encoding)
        shape = codec.shape({BLOCKS: spec})
        return Encoded(encoding, {BLOCKS: name}, raw[0] if len(raw) == 3 else None, shape)

    def _info(self, name: str) -> TensorInfo:
        """Where a tensor of the file is, with the shape that it has decoded."""
        info, encoded = self.checkpoint.tensors[name], self._encoded(name)
        if encoded is None:
            return info
        shape = encoded.shape if encoded.stacked is None else (encoded.stacked, *encoded.shape)
        return replace(info, dtype=DECODED, shape=shape)

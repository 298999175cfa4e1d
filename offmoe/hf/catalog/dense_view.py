"""A quantized checkpoint under dense names and shapes, as if it were not quantized.

The dense names are those that the same checkpoint would have without quantization. So transformers' own renamings and
converters apply to them, and every architecture works with every format. No quantizer of transformers takes part, and
none of their packages is needed.

Experts are not read here. A quantized dense weight is read once, when transformers takes it: its raw bytes go to the
device and are decoded there, one weight at a time. A weight whose components are not all present and understood is an
error.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.hf.catalog.quant_config import ACTIVATIONS, REMEDY, Method, read_method
from offmoe.quant.codec import Codec, Encoding, Spec
from offmoe.quant.raw_slot import OFFSET, STATE, offset_of
from offmoe.storage.checkpoint import Checkpoint, read_tensor
from offmoe.storage.layout import Segment, TensorInfo

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A quantized weight of the checkpoint."""

    encoding: Encoding
    names: Mapping[str, str]
    """Component -> name of its tensor in the checkpoint."""
    stacked: int | None
    """Number of experts in the weight, if it has a row for every expert; None if it is one matrix."""
    shape: tuple[int, ...]
    """Shape of one matrix, decoded."""


class Rebuilt(NamedTuple):
    """A dense weight that is made of tensors under other names, or of changed values."""

    sources: tuple[str, ...]
    """Names in the checkpoint; those that are quantized are in `DenseView.encoded` under these names."""
    undo: Callable[..., torch.Tensor] | None
    """Makes the weight of the decoded sources; None: the one source as it is."""


@dataclass(frozen=True)
class DenseView:
    """The checkpoint by dense names."""

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    """All tensors, with the shapes that they have decoded."""
    encoded: Mapping[str, Encoded] = field(default_factory=dict)
    """The quantized tensors among them."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Dense name -> name in the checkpoint, of tensors of experts that are not quantized and called otherwise there."""
    rebuilt: Mapping[str, Rebuilt] = field(default_factory=dict)
    """Dense weights of GGUF files."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: object) -> DenseView:
        """The view of a checkpoint.

        Args:
            checkpoint: the tensors at rest.
            config: the model's transformers config. If it names no quantization, the names are the checkpoint's own.

        Raises:
            UnsupportedModelError: a method, layout or component that offmoe does not know.
            MissingTensorError: a component is absent.
            CheckpointError: the components of a weight are not those of one matrix.
        """
        method = read_method(checkpoint.model, config)
        if method is None:
            return cls(checkpoint, checkpoint.tensors)
        return _Reading(checkpoint, method).view()

    @property
    def folder(self) -> Path:
        return self.checkpoint.model

    def where(self, name: str) -> str:
        """Path of the shard that holds the tensor of this dense name, for messages."""
        return str(self.checkpoint.shards[self.tensors[name].shard])

    def is_decoded(self, name: str) -> bool:
        """Whether the tensor is not one of the checkpoint's as it stands there."""
        return name in self.encoded or name in self.rebuilt

    @property
    def needs_decoding(self) -> bool:
        """Whether transformers cannot read the checkpoint itself."""
        return bool(self.encoded or self.rebuilt)

    def raw_names(self, name: str) -> Iterable[str]:
        """Names of the checkpoint's tensors from which the tensor of this dense name is decoded."""
        if name in self.rebuilt:
            return self.rebuilt[name].sources
        weight = self.encoded.get(name)
        return (self.renamed.get(name, name),) if weight is None else weight.names.values()

    def encoding(self, name: str, rows: int | None) -> Encoding | None:
        """The encoding that one expert's part of a tensor has.

        Args:
            name: the dense name.
            rows: number of experts that the tensor must hold; None if it must be one matrix.

        Returns:
            None if the tensor is not quantized.

        Raises:
            UnsupportedModelError: the quantized tensor does not hold `rows` experts.
        """
        weight = self.encoded.get(name)
        if weight is None:
            return None
        if weight.stacked != rows:
            raise UnsupportedModelError(
                f"{self.where(name)}: quantized weight {name!r} holds several experts in a way that offmoe cannot "
                f"take apart; {REMEDY}"
            )
        return weight.encoding

    def check_components(self, name: str, common: Encoding | None) -> None:
        """Check that a tensor's encoding has the components of `common`, that of other experts; other sizes are fine.

        Raises:
            CheckpointError: a component is absent or too many. Some are optional in a format and change what others
                mean, so that an incomplete expert would be decoded wrong.
        """
        weight = self.encoded.get(name)
        if weight is None or common is None:
            return
        if [part for part, _ in weight.encoding.components] != [part for part, _ in common.components]:
            raise CheckpointError(
                f"{self.where(name)}: tensor {name!r} is {_describe(weight.encoding)}, those of other experts of its "
                f"layer are {_describe(common)}; complete the download, or quantize all experts of a layer alike"
            )

    def segments(self, name: str, part: int | None = None, parts: int = 1) -> tuple[Segment, ...]:
        """Where a tensor's bytes are, component by component; with `part`, one of `parts` equal parts of it."""
        return tuple([self.checkpoint.segment(raw, part, parts) for raw in self.raw_names(name)])

    def lazy(self, names: Iterable[str], device: torch.device) -> dict[str, LazyTensor]:
        """A state dict for transformers' loader; each value is read and decoded on `device` when the loader takes
        it."""
        lock = threading.Lock()
        return {name: LazyTensor(self, name, device, lock) for name in names}

    def decode(self, name: str, device: torch.device) -> torch.Tensor:
        """Read a whole tensor. A quantized one is decoded to float32, from which every compute dtype is rounded."""
        if name in self.rebuilt:
            sources, undo = self.rebuilt[name]
            values = [self._decode_stored(source, device) for source in sources]
            return values[0] if undo is None else undo(*values)
        return self._decode_stored(name, device)

    def _decode_stored(self, name: str, device: torch.device) -> torch.Tensor:
        weight = self.encoded.get(name)
        if weight is None:
            return read_tensor(self.checkpoint, self.renamed.get(name, name)).to(device)
        raw = {component: read_tensor(self.checkpoint, raw) for component, raw in weight.names.items()}
        codec = weight.encoding.codec
        if STATE in raw:
            raw[STATE] = offset_of(raw[STATE], codec, name)
        raw = {component: tensor.to(device) for component, tensor in raw.items()}
        if weight.stacked is None:
            return codec.decode(raw, torch.float32)
        rows = [codec.decode({c: t[i] for c, t in raw.items()}, torch.float32) for i in range(weight.stacked)]
        return torch.stack(rows)


@dataclass(frozen=True)
class LazyTensor:
    """A value of the state dict that transformers loads from. The loader takes `value[...]`, once."""

    view: DenseView
    name: str
    device: torch.device
    lock: threading.Lock
    """Shared by all values: without it, each thread of the loader would hold the raw and decoded bytes of a weight."""

    def __getitem__(self, index: object) -> torch.Tensor:
        assert index is Ellipsis
        with self.lock:
            return self.view.decode(self.name, self.device)


@dataclass
class _Reading:
    """Sorts a checkpoint's names into plain tensors and components of quantized weights."""

    checkpoint: Checkpoint
    method: Method
    codecs: dict[object, Codec] = field(default_factory=dict)
    """Codecs that were read from a file, by the weights that share them."""
    checked: dict[Encoding, tuple[Encoding, tuple[int, ...]]] = field(default_factory=dict)
    """Valid encodings -> the one object for all equal ones, and the shape of the decoded matrix."""

    def view(self) -> DenseView:
        plain: dict[str, TensorInfo] = {}
        components: dict[str, dict[str, str]] = {}
        dropped: list[tuple[str, str]] = []
        for name, info in self.checkpoint.tensors.items():
            split = self.method.split(name)
            if split is None:
                plain[name] = info
                continue
            dense, component = split
            if not component:
                dropped.append((name, dense))
                continue
            first = components.setdefault(dense, {}).setdefault(component, name)
            if first != name:
                raise CheckpointError(
                    f"{self.checkpoint.model}: {first!r} and {name!r} are both the {component} of {dense!r}; keep one "
                    "of the two"
                )
        for name in components.keys() & plain.keys():
            if not self.method.main:
                raise CheckpointError(
                    f"{self.checkpoint.model}: has {name!r} both dense and quantized "
                    f"({next(iter(components[name].values()))!r}); keep one of the two"
                )
            del plain[name]
            components[name]["weight"] = name
        self._refuse_unknown(plain, components)
        activations = [name for name, of in dropped if of in components and name.endswith(ACTIVATIONS)]
        if activations:
            logger.warning(
                "%s: %d scales of activations are not used (%s is one): weights are decoded, activations stay as they "
                "are",
                self.checkpoint.model,
                len(activations),
                activations[0],
            )
        encoded = {name: self._encoded(name, names) for name, names in components.items()}
        tensors = plain | {name: self._info(weight) for name, weight in encoded.items()}
        return DenseView(self.checkpoint, tensors, encoded)

    def _refuse_unknown(self, plain: Mapping[str, TensorInfo], components: Mapping[str, object]) -> None:
        for name in plain:
            module, _, last = name.rpartition(".")
            if last != "bias" and (f"{module}.weight" in components or module in components):
                raise UnsupportedModelError(
                    f"{self._shard(name)}: tensor {name!r} stands beside a quantized weight, and offmoe does not know "
                    f"what it means for it; {REMEDY}"
                )

    def _encoded(self, name: str, names: dict[str, str]) -> Encoded:
        infos = {component: self.checkpoint.tensors[raw] for component, raw in names.items()}
        specs = {component: Spec(info.shape, info.dtype) for component, info in infos.items()}
        stacked = _stacked(specs)
        if stacked is not None:
            specs = {c: Spec(spec.shape[1:], spec.dtype) for c, spec in specs.items()}
        try:
            codec = self._codec(name, names, specs)
            if STATE in specs:
                specs[STATE] = OFFSET
            # sorted, so that equal weights have equal slots, in whatever order the checkpoint has their parts
            encoding = Encoding(codec, tuple(sorted(specs.items())))
            if encoding not in self.checked:
                self._check(name, names, codec, specs)
                self.checked[encoding] = encoding, codec.shape(specs)
        except ValueError as error:
            raise CheckpointError(
                f"{self._shard(next(iter(names.values())))}: quantized weight {name!r} cannot be decoded: {error}; "
                "config.json and the shards are not of the same model, or the download is damaged"
            ) from error
        encoding, shape = self.checked[encoding]
        return Encoded(encoding, {part: names[part] for part, _ in encoding.components}, stacked, shape)

    def _check(self, name: str, names: Mapping[str, str], codec: Codec, specs: Mapping[str, Spec]) -> None:
        absent, unknown = sorted(codec.required - specs.keys()), sorted(specs.keys() - codec.required)
        if absent:
            raise MissingTensorError(
                f"{self.checkpoint.model}: quantized weight {name!r} ({codec.name}) lacks its {absent[0]}, it has "
                f"only {', '.join(repr(n) for n in sorted(names.values()))}; complete the download"
            )
        if unknown:
            raise ValueError(f"{names[unknown[0]]!r} is no part of {codec.name}")

    def _codec(self, name: str, names: Mapping[str, str], specs: Mapping[str, Spec]) -> Codec:
        """The codec of a weight. bitsandbytes keeps it in a tensor, which is read once for all weights that look alike:
        their names differ only in numbers."""

        def read(component: str) -> bytes:
            return read_tensor(self.checkpoint, names[component]).numpy().tobytes()

        if STATE not in specs:
            return self.method.codec(name, specs, read)
        alike = NUMBER.sub(".#", name), tuple(sorted((c, s) for c, s in specs.items() if c != STATE))
        if alike not in self.codecs:
            self.codecs[alike] = self.method.codec(name, specs, read)
        return self.codecs[alike]

    def _info(self, weight: Encoded) -> TensorInfo:
        first = self.checkpoint.tensors[next(iter(weight.names.values()))]
        shape = weight.shape if weight.stacked is None else (weight.stacked, *weight.shape)
        return TensorInfo(first.shard, first.offset, first.nbytes, DECODED, shape)

    def _shard(self, name: str) -> str:
        return str(self.checkpoint.shards[self.checkpoint.tensors[name].shard])


DECODED = torch.bfloat16
"""Placeholder for the dtype of a decoded tensor, which can be any compute dtype."""


def _describe(encoding: Encoding) -> str:
    parts = ", ".join(f"{name} {list(spec.shape)}" for name, spec in encoding.components)
    return f"{encoding.codec.name} ({parts})"


NUMBER = re.compile(r"\.\d+(?=\.)")
"""Matches the number of a layer or an expert in a name, but not the digit of w1 and w2."""
MATRICES = {"weight": 2, "blocks": 3, "packed": 2, "qweight": 2}
"""Component -> its number of dimensions in one matrix, for the largest component of each format."""


def _stacked(specs: Mapping[str, Spec]) -> int | None:
    """Number of experts that a weight holds, stacked; None if it is one matrix."""
    for component, dims in MATRICES.items():
        if component in specs:
            shape = specs[component].shape
            alike = all(spec.shape[:1] == shape[:1] for spec in specs.values())
            return shape[0] if len(shape) == dims + 1 and alike else None
    return None

"""What a GGUF file's metadata say about its model, under the names of the keys without the architecture's prefix.

Numbers that are stored as float32 come back as the shortest decimal that rounds to them, which is what the model's
config.json says: 1e-05, not 9.999999747378752e-06. Every key that is read is remembered, so that a key that nobody
reads can be reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.storage.gguf_set import GgufSet
from offmoe.storage.gguf_types import BLOCK_TYPES

T = TypeVar("T")
REQUIRED: Any = object()
"""Default of a key that a file must have."""
BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(.+)")
"""The name of a tensor of a block, which is a decoder layer."""
NEUTRAL: Mapping[str, tuple[int, ...]] = {"attention.causal": (1,), "attention.scale": (0,)}
"""Values with which a key changes nothing, where these are not 0 and 1."""
CHANGING = re.compile(r"^[^.]+\.(rope|attention)\.|_(scale|softcapping)$")
"""Keys of which any could change what a model computes."""
BESIDE = "put the model's config.json beside the file"
"""What to do where the metadata are not enough."""


class ComputesOtherwiseError(UnsupportedModelError):
    """The metadata say that the model computes what no model of transformers does, whatever its configuration."""


class Metadata:
    """The metadata of one GGUF model, with the shapes of its tensors."""

    def __init__(self, gguf: GgufSet) -> None:
        self.file: Path = gguf.files[0]
        self.architecture: str = gguf.metadata["general.architecture"]
        self.shapes: dict[str, tuple[int, ...]] = {name: decoded_shape(gguf, name) for name in gguf.tensors}
        """Shape of every tensor once decoded, by the file's own names."""
        self._values: Mapping[str, Any] = gguf.metadata
        self._read: set[str] = set()
        self.remarks: list[str] = []
        """What a user should know if the configuration is made of the metadata."""

    def integer(self, key: str, default: T = REQUIRED) -> int | T:
        """A whole number, 0 or more. A list with one number per layer is that number if all are equal."""
        value = self._value(key, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, tuple):
            raise UnsupportedModelError(f"{self.file}: {key} differs between layers ({value}); {BESIDE}")
        return cast("int | T", self._typed(key, value, default, type(value) is int and value >= 0, "a whole number"))

    def number(self, key: str, default: T = REQUIRED) -> float | T:
        """A number, as the shortest decimal that rounds to it."""
        value = self._value(key, default)
        if type(value) is float:
            value = float(str(np.float32(value)))
        finite = type(value) in (int, float) and abs(value) < float("inf")
        return cast("float | T", self._typed(key, value, default, finite, "a number"))

    def flag(self, key: str, default: T = REQUIRED) -> bool | T:
        value = self._value(key, default)
        return cast("bool | T", self._typed(key, value, default, type(value) is bool, "true or false"))

    def text(self, key: str, default: T = REQUIRED) -> str | T:
        value = self._value(key, default)
        return cast("str | T", self._typed(key, value, default, type(value) is str, "a text"))

    def numbers(self, key: str, default: T = REQUIRED) -> tuple[Any, ...] | T:
        """A list of numbers."""
        value = self._value(key, default)
        return cast("tuple[Any, ...] | T", self._typed(key, value, default, type(value) is tuple, "a list of numbers"))

    def token(self, name: str) -> int | None:
        """The id of a special token, such as "bos"."""
        value = self._values.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, decoded.

        Raises:
            CheckpointError: the file has no such tensor.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.file}: has no tensor {name!r}; the download is incomplete: download it again")
        return self.shapes[name]

    def blocks_with(self, leaf: str) -> tuple[int, ...]:
        """The numbers of the blocks (decoder layers) that have a tensor of this name, ascending."""
        matches = (BLOCK.fullmatch(name) for name in self.shapes if name.endswith(f".{leaf}"))
        return tuple(sorted(int(match[1]) for match in matches if match and match[2] == leaf))

    def unread(self) -> list[str]:
        """The keys of the architecture that nobody read, and that change nothing.

        Raises:
            UnsupportedModelError: one of them could change what the model computes: its value is not neutral, or it is
                part of a rope scaling.
        """
        prefix = f"{self.architecture}."
        keys = sorted(key for key in self._values if key.startswith(prefix) and key not in self._read)
        for key in keys:
            neutral = NEUTRAL.get(key.removeprefix(prefix), (0, 1))
            if ".rope.scaling." in key or (CHANGING.search(key) and self._values[key] not in neutral):
                raise UnsupportedModelError(f"{self.file}: {key} is not known to offmoe; {BESIDE}")
        return keys

    def ignore(self, *keys: str) -> None:
        """Take keys as read that change nothing in the configuration."""
        self._read.update(f"{self.architecture}.{key}" for key in keys)

    def _value(self, key: str, default: object) -> Any:
        full = f"{self.architecture}.{key}"
        self._read.add(full)
        if full not in self._values and default is REQUIRED:
            raise CheckpointError(f"{self.file}: its metadata lack {full}; {BESIDE}")
        return self._values.get(full, default)

    def _typed(self, key: str, value: Any, default: T, right: bool, wanted: str) -> Any:
        if not right and value is not default:
            raise CheckpointError(
                f"{self.file}: {self.architecture}.{key} is {repr(value)[:40]}, not {wanted}; download it again"
            )
        return value


def decoded_shape(gguf: GgufSet, name: str) -> tuple[int, ...]:
    """The shape of a tensor once decoded."""
    shape, block = gguf.tensors[name].shape, BLOCK_TYPES.get(gguf.types[name])
    return shape if block is None else (*shape[:-1], shape[-1] // block.nbytes * block.values)


def rope_parameters(metadata: Metadata, rotated: int, head_dim: int | None = None) -> dict[str, Any]:
    """The rotary embedding's parameters, as transformers' configs have them.

    Args:
        metadata: the file's metadata.
        rotated: dimensions that the architecture rotates if the file does not say.
        head_dim: dimensions of a head, for an architecture that may rotate a part of them.

    Raises:
        UnsupportedModelError: a kind of scaling that the metadata do not describe completely.
    """
    factors = [name for name in ("rope_freqs.weight", "rope_factors_long.weight") if name in metadata.shapes]
    kind = metadata.text("rope.scaling.type", "none")
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base", 10000.0)}
    if factors:
        raise UnsupportedModelError(
            f"{metadata.file}: scales its rotary embedding by the tensor {factors[0]!r}, which no config of "
            f"transformers can express; {BESIDE}"
        )
    if kind in ("linear", "yarn"):
        out |= {"rope_type": kind, "factor": metadata.number("rope.scaling.factor")}
    elif kind != "none":
        raise UnsupportedModelError(f"{metadata.file}: rope scaling {kind!r} is not known to offmoe; {BESIDE}")
    if kind == "yarn":
        out["original_max_position_embeddings"] = metadata.integer("rope.scaling.original_context_length")
        for key, name in YARN.items():
            if (value := metadata.number(f"rope.scaling.{key}", None)) is not None:
                out[name] = value
        if (multiplier := metadata.number("rope.scaling.yarn_log_multiplier", None)) is not None:
            # written as 0.1 * mscale_all_dim; llama.cpp takes mscale to be the same, as in every DeepSeek
            out["mscale"] = out["mscale_all_dim"] = round(10 * multiplier, 6)
    actual = metadata.integer("rope.dimension_count", rotated)
    if head_dim is not None and not actual == rotated == head_dim:
        out["partial_rotary_factor"] = actual / head_dim
    elif head_dim is None and actual != rotated:
        raise UnsupportedModelError(
            f"{metadata.file}: rotates {actual} dimensions of its heads, and {metadata.architecture} of transformers "
            f"{rotated}; {BESIDE}"
        )
    metadata.ignore("rope.scaling.finetuned")
    return out


YARN = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
    "attn_factor": "attention_factor",
}
"""Keys of YaRN's further parameters -> their names in transformers."""

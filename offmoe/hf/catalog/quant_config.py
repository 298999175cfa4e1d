"""Read `quantization_config`: the names that a quantized weight's components have, and the codec that decodes them.

A `Method` knows which endings of tensor names belong to a format, and which codec a weight's components need. The
tensors in the checkpoint decide whether a weight is quantized, not the config's lists of modules: those lists name
modules of the model that was quantized, and an expert is seldom a module of its own in transformers. The config
supplies what the tensors cannot say (the size of a block, how zeros are stored) and must not contradict them. A format
that is not known to be read right is refused by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.quant.bitsandbytes import read_state
from offmoe.quant.codec import Codec, Spec
from offmoe.quant.float_formats import Mxfp4, ScaledFloat
from offmoe.quant.int_formats import TILES_FORMAT, Awq, Gptq, PackedInt, TiledInt
from offmoe.quant.packed_weight import TILES
from offmoe.quant.raw_slot import STATE

logger = logging.getLogger(__name__)

REMEDY = "use another quantization of the model (FP8, MXFP4, compressed-tensors, GPTQ, AWQ or bitsandbytes), or bf16"


Read = Callable[[str], bytes]
"""Returns the bytes of a small component of a weight."""
Endings = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Method:
    """One quantization method, as one checkpoint configures it."""

    endings: Endings
    """Ending of a tensor's name -> (ending of the dense name, component). The component "" is not needed."""
    codec: Callable[[str, Mapping[str, Spec], Read], Codec]
    """Takes a weight's dense name, the shape and dtype of its components, and a function that reads one. Returns the
    weight's codec. Raises ValueError if the weight cannot be decoded; the message says why."""
    main: bool = True
    """Whether the tensor of the dense name itself is a component, called "weight"."""

    def split(self, name: str) -> tuple[str, str] | None:
        """Split a tensor's name into (dense name, component); None if the tensor is none of this method's."""
        for ending, (instead, component) in self.endings.items():
            if name.endswith(ending):
                return name[: -len(ending)] + instead, component
        return None


ACTIVATIONS = (".input_scale", ".activation_scale", ".input_zero_point", ".input_global_scale")
"""Endings of the names of activation scales. offmoe does not quantize activations: stock does not either where it
dequantizes weights, and activations in full precision are closer to the unquantized model."""
NOT_NEEDED: Endings = dict.fromkeys(ACTIVATIONS, (".weight", ""))

FP8: Endings = {
    ".weight_scale_inv": (".weight", "scale"),
    ".weight_scale": (".weight", "scale"),
    "_proj_scale_inv": ("_proj", "scale"),  # fused experts, as transformers saves them
    "_proj_activation_scale": ("_proj", ""),
    **NOT_NEEDED,
}
"""FP8 of transformers, DeepSeek and vLLM: `x.weight` with `x.weight_scale_inv` or `x.weight_scale`."""
MXFP4: Endings = {"_blocks": ("", "blocks"), "_scales": ("", "scales")}
"""gpt-oss: `x_blocks` and `x_scales`."""
AWQ: Endings = {f".{c}": (".weight", c) for c in ("qweight", "qzeros", "scales")}
"""AWQ in the layout "gemm": `x.qweight`, `x.qzeros`, `x.scales`."""
GPTQ: Endings = {**AWQ, ".g_idx": (".weight", "g_idx")}
"""GPTQ: `x.qweight`, `x.qzeros`, `x.scales`, `x.g_idx`."""
BITSANDBYTES: Endings = {
    **{f".weight.{c}": (".weight", c) for c in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")},
    ".weight.quant_state.bitsandbytes__nf4": (".weight", STATE),
    ".weight.quant_state.bitsandbytes__fp4": (".weight", STATE),
}
"""bitsandbytes in 4 bits: `x.weight` with `x.weight.absmax`, `.quant_map`, `.quant_state.*`. A doubly quantized weight
also has `.nested_absmax` and `.nested_quant_map`."""
COMPRESSED_TENSORS: Endings = {
    ".weight_packed": (".weight", "packed"),
    ".weight_scale": (".weight", "scale"),
    ".weight_zero_point": (".weight", "zero"),
    ".weight_g_idx": (".weight", "g_idx"),
    ".weight_shape": (".weight", ""),  # follows from the others
    **{f".weight_{part}": (".weight", part) for part in TILES.values()},
    **{f".weight_{part}_pad": (".weight", "") for part in TILES.values()},
    **NOT_NEEDED,
}
"""compressed-tensors: `x.weight_packed` or an FP8 `x.weight`, with `x.weight_scale`, `_zero_point`, `_g_idx`. offmoe's
tiles: `x.weight_tiles`, `x.weight_tiles_scale`, `_zero`, with bytes behind them that align what follows."""


def read_method(source: object, config: object) -> Method | None:
    """The quantization method that a transformers config names.

    Args:
        source: the model that the config belongs to, for messages.
        config: the transformers config.

    Returns:
        None if the config names no quantization.

    Raises:
        UnsupportedModelError: a method or layout that offmoe cannot decode.
        CheckpointError: the config contradicts itself or lacks a value.
    """
    values = quantization_config(config)
    if values is None:
        return None
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    reader = READERS.get(method)
    if reader is None:
        raise UnsupportedModelError(f"{source}: quantized by {method!r}, which offmoe cannot decode; {REMEDY}")
    try:
        return reader(values)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source}: {error}; {REMEDY}") from None
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{source}: quantization_config of config.json is not one of {method} ({error!r}); download it again"
        ) from error


def shapes_are_in_shards(config: object) -> bool:
    """Whether the shards' contents are needed to know the shapes of the weights; their headers do not suffice."""
    return (quantization_config(config) or {}).get("quant_method") == "bitsandbytes"


def quantization_method(config: object) -> str | None:
    """Name of the quantization method of a checkpoint with this configuration; None if it is not quantized."""
    method = (quantization_config(config) or {}).get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def quantization_config(config: object) -> Mapping[str, Any] | None:
    """`quantization_config` of a model or of its text part, as plain data; None if it has none."""
    text = getattr(config, "get_text_config", lambda: None)()
    for holder in (config, text):
        quantization = getattr(holder, "quantization_config", None)
        if quantization is not None:
            values: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
            return values
    return None


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    high, wide = (int(size) for size in value)
    if high < 1 or wide < 1:
        raise ValueError(f"blocks of {high} x {wide}")
    return high, wide


def _group(value: Any) -> int | None:
    """Columns per group; None if all columns are one group, for which configs write -1."""
    return int(value) if value is not None and int(value) > 0 else None


def _gptq(values: Mapping[str, Any]) -> Method:
    layout = str(values.get("checkpoint_format") or "gptq")
    if layout not in ("gptq", "gptq_v2") or values.get("is_marlin_format"):
        raise UnsupportedModelError(f"GPTQ in the layout {layout!r}, which is repacked for one kernel")
    usual_bits, group = int(values["bits"]), _group(values.get("group_size"))
    needs_index = bool(values.get("desc_act") or values.get("dynamic"))  # columns reordered, or bits differ by module

    def codec(name: str, specs: Mapping[str, Spec], read: Read) -> Codec:
        bits, index = usual_bits, specs.get("g_idx")
        if index is None and needs_index:
            raise ValueError("it has no g_idx, which says the order of its columns; complete the download")
        if index is not None and "qweight" in specs and index.shape and index.shape[0]:
            bits = specs["qweight"].shape[0] * 32 // index.shape[0]
        if bits not in (4, 8):
            raise UnsupportedModelError(f"tensor {name!r} is GPTQ in {bits} bits, which offmoe cannot decode; {REMEDY}")
        minus_one = layout == "gptq"  # then the stored zero points are one less than the real ones
        return Gptq(bits, group, index is not None, minus_one, reordered=needs_index)

    return Method(GPTQ, codec, main=False)


def _awq(values: Mapping[str, Any]) -> Method:
    bits = int(values.get("bits", values.get("w_bit", 4)))
    layout = str(getattr(values.get("version"), "value", values.get("version", "gemm"))).lower()
    layout = str(values.get("format", layout)).rpartition(".")[2].lower()
    if bits != 4 or layout != "gemm" or not values.get("zero_point", True):
        points = "" if values.get("zero_point", True) else ", without zero points"
        raise UnsupportedModelError(f"AWQ in {bits} bits and the layout {layout!r}{points}")
    awq = Awq(_group(values.get("group_size", values.get("q_group_size", 128))))
    return Method(AWQ, lambda *_: awq, main=False)


def _bitsandbytes(values: Mapping[str, Any]) -> Method:
    if values.get("load_in_8bit") or values.get("_load_in_8bit"):
        raise UnsupportedModelError("bitsandbytes in 8 bits, whose outliers are split off when it multiplies")

    def codec(name: str, specs: Mapping[str, Spec], read: Read) -> Codec:
        if STATE not in specs:
            raise ValueError("it has no quant_state; complete the download")
        return read_state(read(STATE))[0]

    return Method(BITSANDBYTES, codec)


def _compressed_tensors(values: Mapping[str, Any]) -> Method:
    sparsity = (values.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UnsupportedModelError(f"compressed-tensors with sparsity in the format {sparsity!r}")
    if (values.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedModelError("compressed-tensors with rotations of activations (transform_config)")
    schemes = [_scheme(group, values) for group in values["config_groups"].values()]

    def codec(name: str, specs: Mapping[str, Spec], read: Read) -> Codec:
        scheme = _scheme_of(schemes, name.removesuffix(".weight"))
        if scheme.ordered and "g_idx" not in specs:
            raise ValueError("it has no weight_g_idx, which says the order of its columns; complete the download")
        if "g_idx" in specs and isinstance(scheme.codec, PackedInt):
            return replace(scheme.codec, ordered=True)
        return scheme.codec

    return Method(COMPRESSED_TENSORS, codec)


@dataclass(frozen=True)
class Scheme:
    """One group of a compressed-tensors config."""

    targets: tuple[str, ...]
    """Class names, module names or "re:" patterns of the modules in the group."""
    codec: ScaledFloat | PackedInt | TiledInt
    ordered: bool
    """Whether the columns are reordered."""


def _scheme_of(schemes: Sequence[Scheme], module: str) -> Scheme:
    """The scheme that claims a module."""

    def named(target: str) -> bool:
        if target.startswith("re:"):
            return re.match(target.removeprefix("re:"), module) is not None
        return module == target or module.endswith(f".{target}")

    by_name = [scheme for scheme in schemes if any(map(named, scheme.targets))]
    by_class = [s for s in schemes if any("." not in t and not t.startswith("re:") for t in s.targets)]
    for candidates in (by_name, by_class, schemes):
        if len(set(candidates)) == 1:
            return candidates[0]
        if candidates:
            raise ValueError(f"{len(candidates)} of the config's groups claim it")
    raise ValueError("none of the config's groups claims it")


def _scheme(group: Mapping[str, Any], values: Mapping[str, Any]) -> Scheme:
    weights, layout = group["weights"], group.get("format") or values.get("format")
    bits, kind, strategy = int(weights["num_bits"]), weights.get("type", "int"), weights.get("strategy")
    group_size = _group(weights.get("group_size"))
    strategy = strategy or ("group" if group_size else "tensor" if weights.get("group_size") is None else "channel")
    packed = layout in ("pack-quantized", TILES_FORMAT) and kind == "int" and bits in (4, 8)
    scaled = layout in ("float-quantized", "naive-quantized") and kind == "float" and bits == 8
    strategies = ("group", "channel", "tensor") if packed else ("tensor", "channel", "block")
    if not (packed or scaled) or strategy not in strategies:
        raise UnsupportedModelError(
            f"compressed-tensors in the format {layout!r} with {bits}-bit {kind} weights by {strategy}"
        )
    targets = tuple(map(str, group["targets"]))
    if scaled:
        block = _pair(weights.get("block_structure")) if strategy == "block" else None
        return Scheme(targets, ScaledFloat(block), ordered=False)
    symmetric = bool(weights.get("symmetric", True))
    codec = (TiledInt if layout == TILES_FORMAT else PackedInt)(
        bits, group_size if strategy == "group" else None, symmetric
    )
    return Scheme(targets, codec, ordered=weights.get("actorder") in ("group", "dynamic", True))


def _fp8(values: Mapping[str, Any]) -> Method:
    codec = ScaledFloat(_pair(values.get("weight_block_size")))
    return Method(FP8, lambda *_: codec)


READERS: Mapping[str, Callable[[Mapping[str, Any]], Method]] = {
    "fp8": _fp8,
    "mxfp4": lambda values: Method(MXFP4, lambda *_: Mxfp4(), main=False),
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
}
"""quant_method -> the function that reads the rest of the config."""

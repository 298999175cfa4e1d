"""What the experts of a model weigh, told from its configuration alone.

Nothing moves and no weight is needed: shapes come from the model on the meta device, bytes from its dtype or from
what `quantization_config` says about its experts. The formats are those that published checkpoints have; what their
scales and zero points take is counted, because for 4 bits it is an eighth of the whole.

What it must never do: pass for a checkpoint. It says how much there is, not where; only headers say that.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from offmoe.budget.device import DenseLayerBytes, ModelBytes
from offmoe.budget.needs import ExpertBytes, Parameters, count_parameters, model_bytes
from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.adapters.find import expert_parameters, find_experts, find_top_k, require_adapter
from offmoe.hf.catalog.quant_config import quantization_config, quantization_method
from offmoe.hf.load.dense_layers import dense_layers
from offmoe.hf.load.meta_model import build_meta
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout, aligned
from offmoe.storage.read_plan import ALIGNMENT
from offmoe.types import CacheShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MatrixBytes = Callable[[int, int], int]
"""(rows, columns) of one matrix as the checkpoint has it -> its bytes, scales included."""

EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts."""
MANY_MODULES = 64
"""Experts of a layer above which making each as a module of its own takes long."""

IGNORED_LISTS = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")
"""What quantization methods call the modules that stay as they were."""


class Estimate(NamedTuple):
    """What a plan needs to know of a model. experts: bytes of one in each MoE layer. meta: the model that was measured,
    which may have fewer experts.
    """

    shape: CacheShape
    experts: tuple[ExpertBytes, ...]
    parameters: Parameters
    needs: ModelBytes
    meta: PreTrainedModel


def estimate(
    config: PretrainedConfig,
    cls: type[PreTrainedModel],
    dtype: torch.dtype,
    stored: torch.dtype,
    *,
    unified_memory: bool,
) -> Estimate:
    """What a model of this configuration takes, computed in `dtype`, its weights `stored` in that one.

    Experts that are modules of their own cannot be counted by making them all: 2,048 of them in 30 layers are 200,000
    modules and a minute. Such a model is made with two experts and with three, and what one more adds is added for the
    rest. Raises UnsupportedModelError for a model without experts and for a quantization whose bytes are not known,
    CheckpointError if no such model can be made.
    """

    def measured(values: PretrainedConfig) -> Estimate:
        meta = build_meta(values, cls)
        shape, experts = estimate_experts(meta, stored)
        needs = model_bytes(meta, experts, dense_layers(meta), dtype, stored, unified_memory=unified_memory)
        return Estimate(shape, experts, count_parameters(meta), needs, meta)

    for name in EXPERTS_NAMES:
        count = getattr(config.get_text_config(), name, None)
        if not isinstance(count, int) or count < MANY_MODULES or not _apart(_with_experts(config, name, 2), cls):
            continue
        two, three = (measured(_with_experts(config, name, n)) for n in (2, 3))
        if set(two.shape.experts) == {2} and set(three.shape.experts) == {3}:
            return _continued(two, three, count)
    return measured(config)


def _with_experts(config: PretrainedConfig, name: str, count: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    setattr(config.get_text_config(), name, count)
    return config


def _apart(config: PretrainedConfig, cls: type[PreTrainedModel]) -> bool:
    """Whether each expert has parameters of its own."""
    try:
        places = [place for _, place in expert_parameters(build_meta(config, cls)).values()]
    except CheckpointError:  # so few experts are none of this architecture's
        return False
    return bool(places) and all(place.expert is not None for place in places)


def _continued(two: Estimate, three: Estimate, count: int) -> Estimate:
    """The values of two and of three experts, as a straight line, at `count`; that of one expert is the same in all."""

    def line(a: int, b: int) -> int:
        return a + (count - 2) * (b - a)

    shape = replace(two.shape, experts=(count,) * two.shape.layers)
    parameters = Parameters(*map(line, two.parameters, three.parameters))
    layers = zip(two.needs.layers, three.needs.layers, strict=True)
    needs = replace(
        two.needs,
        dense=line(two.needs.dense, three.needs.dense),
        layers=tuple(DenseLayerBytes(*map(line, a, b)) for a, b in layers),
    )
    return Estimate(shape, two.experts, parameters, needs, two.meta)


def estimate_experts(meta_model: PreTrainedModel, dtype: torch.dtype) -> tuple[CacheShape, tuple[ExpertBytes, ...]]:
    """Shape and bytes of every MoE layer of a model on the meta device; weights at rest in `dtype` if not quantized.

    Raises UnsupportedModelError for a model without experts and for a quantization whose bytes are not known.
    """
    modules = find_experts(meta_model)
    if not modules:
        raise UnsupportedModelError(f"{type(meta_model).__name__} has no experts that offmoe can find")
    top_k = [
        require_adapter(module).top_k(module)
        or find_top_k(module, meta_model.get_submodule(name.rpartition(".")[0]), meta_model.config)
        for name, module in modules.items()
    ]
    sizes = tuple(_expert(name, module, meta_model.config, dtype) for name, module in modules.items())
    experts = tuple(require_adapter(module).num_experts(module) for module in modules.values())
    return CacheShape(experts, tuple(top_k), tuple(size.at_rest for size in sizes)), sizes


def _expert(name: str, module: nn.Module, config: PretrainedConfig, dtype: torch.dtype) -> ExpertBytes:
    """Bytes of one expert of a layer; its matrices as the checkpoint has them, one after the other."""
    shapes = require_adapter(module).shapes(module)
    of_matrix = _matrix_bytes(config, name)
    dense = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    if of_matrix is None:
        slot = aligned(ExpertLayout.of({p: (dtype, shape) for p, shape in shapes.items()}).nbytes, PARAM_ALIGNMENT)
        return ExpertBytes(dense, slot, _read_bytes(dense, len(shapes) + 1), 0)
    at_rest = 0
    for param, shape in shapes.items():
        if len(shape) < 2:
            at_rest += shape[0] * torch.bfloat16.itemsize  # no published format quantizes biases
            continue
        columns, rows = shape if getattr(module, "is_transposed", False) else shape[::-1]
        halves = 2 if param.startswith("gate_up") else 1  # stored apart, so that blocks never straddle them
        at_rest += halves * of_matrix(rows // halves, columns)
    components = 3 * len(shapes)
    slot = aligned(at_rest + components * PARAM_ALIGNMENT, PARAM_ALIGNMENT)
    return ExpertBytes(at_rest, slot, _read_bytes(at_rest, components), dense)


def _read_bytes(at_rest: int, runs: int) -> int:
    """Of the pages that an expert touches if it stands in so many separate runs, as at the worst its matrices do."""
    return aligned(at_rest, ALIGNMENT) + 2 * runs * ALIGNMENT


def _matrix_bytes(config: PretrainedConfig, name: str) -> MatrixBytes | None:
    """How this quantization stores the matrices of experts module `name`; None if it leaves them as they are."""
    values, method = quantization_config(config) or {}, quantization_method(config)
    if method is None or any(_matches(str(entry), name) for key in IGNORED_LISTS for entry in _list(values.get(key))):
        return None
    if method == "fp8":
        block = [n for n in _list(values.get("weight_block_size")) if isinstance(n, int)]
        rows, columns = block if len(block) == 2 else (0, 0)
        return lambda m, n: m * n + 4 * (_parts(m, rows) * _parts(n, columns))
    if method == "mxfp4":
        return lambda m, n: m * _parts(n, 32) * 17  # 16 bytes of codes and one exponent for 32 values
    if method in ("gptq", "awq"):
        bits, group = _number(values, "bits", 4), _number(values, "group_size", 128)
        index = 4 if method == "gptq" else 0  # g_idx: int32 per column
        return lambda m, n: _packed(m, n, bits) + _parts(n, group) * (2 * m + m * bits // 8) + index * n
    if method == "compressed-tensors":
        weights = _compressed_weights(values)
        bits, group = _number(weights, "num_bits", 4), _number(weights, "group_size", 0)
        zeros = 0 if weights.get("symmetric", True) else bits / 8
        return lambda m, n: _packed(m, n, bits) + int(m * _parts(n, group) * (2 + zeros)) + 16  # 16: weight_shape
    raise UnsupportedModelError(
        f"how many bytes experts quantized by {method!r} take cannot be told from the configuration alone; "
        "download the checkpoint: its headers say it"
    )


def _compressed_weights(values: Mapping[str, object]) -> Mapping[str, object]:
    groups = values.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


def _matches(entry: str, name: str) -> bool:
    """Whether an entry of an ignore list means the module: a regular expression ("re:"), a glob or part of a path."""
    if entry.startswith("re:"):
        return re.match(entry[3:], f"{name}.0.up_proj") is not None
    return fnmatch.fnmatchcase(name, entry) or f".{entry}." in f".{name}."


def _packed(rows: int, columns: int, bits: int) -> int:
    return rows * columns * bits // 8


def _parts(size: int, part: int) -> int:
    """Blocks of `part` in `size`, the last one ragged; without a part, one for all."""
    return -(-size // part) if part > 0 else 1


def _number(values: Mapping[str, object], name: str, default: int) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else default


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else []

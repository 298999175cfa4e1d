"""What a model needs by its configuration alone, without a checkpoint.

Shapes come from the model on the meta device, bytes from its dtype or from `quantization_config`, for the formats of
published checkpoints. Scales and zero points are counted: with 4 bits they are an eighth of the whole. The result tells
how many bytes there are, not where; only a checkpoint's headers tell that.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.budget.needs import DenseLayerBytes, ExpertBytes, ModelNeeds, Parameters, model_needs
from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.adapters.find import expert_parameters, find_experts, find_top_k, require_adapter
from offmoe.hf.catalog.quant_config import quantization_config, quantization_method
from offmoe.hf.load.config import build_meta
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout, aligned
from offmoe.storage.read_plan import ALIGNMENT
from offmoe.transfer.staging import staging_plan
from offmoe.types import CacheShape

MatrixBytes = Callable[[int, int], int]
"""(rows, columns) of one matrix in the checkpoint -> its bytes, scales included."""

EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names that configurations have for the number of experts."""
MANY_MODULES = 64
"""Experts per layer from which on building each as a module takes too long."""

IGNORED_LISTS = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")
"""Names that quantization methods have for the list of modules that are not quantized."""


def estimate(
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    dtype: torch.dtype,
    stored: torch.dtype,
    *,
    unified_memory: bool,
) -> tuple[ModelNeeds, PreTrainedModel]:
    """What a model of this configuration needs.

    If every expert is a module of its own and there are very many, not all are built: 2,048 experts in 30 layers are
    200,000 modules and take a minute. The model is built with two and with three experts, and the difference is added
    for each of the others.

    Args:
        config: the configuration.
        cls: the model's class.
        dtype: dtype to compute in.
        stored: dtype of the weights at rest, unless they are quantized.
        unified_memory: whether the device's memory is the host's.

    Returns:
        The needs, and the model that was measured, on the meta device; it may have two experts per layer.

    Raises:
        UnsupportedModelError: the model has no experts, or a quantization whose bytes are not known.
        CheckpointError: no model of this configuration can be built.
    """

    def measure(values: PreTrainedConfig) -> tuple[ModelNeeds, PreTrainedModel]:
        meta = build_meta(values, cls)
        shape, experts = estimate_experts(meta, stored)
        return model_needs(meta, shape, experts, dtype, stored, unified_memory=unified_memory), meta

    for name in EXPERTS_NAMES:
        count = getattr(config.get_text_config(), name, None)
        if not isinstance(count, int) or count < MANY_MODULES or not _are_modules(_with_experts(config, name, 2), cls):
            continue
        (two, meta), (three, _) = (measure(_with_experts(config, name, n)) for n in (2, 3))
        if set(two.shape.experts) == {2} and set(three.shape.experts) == {3}:
            return _extrapolated(two, three, count), meta
    return measure(config)


def with_format(
    needs: ModelNeeds, meta: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype, *, unified_memory: bool
) -> ModelNeeds:
    """What the same model needs with its experts in another format.

    Args:
        needs: what it needs as it is.
        meta: the model on the meta device; it may have fewer experts per layer.
        config: its configuration, in whose `quantization_config` the format stands.
        dtype: dtype of experts that are not quantized.
        unified_memory: whether the device's memory is the host's.

    Raises:
        UnsupportedModelError: the bytes of the format are not known.
    """
    sizes = tuple(_expert(name, module, config, dtype) for name, module in find_experts(meta).items())
    workspace = needs.bytes.workspace + max(e.cast for e in sizes) - max(e.cast for e in needs.experts)
    buffers = max(expert.read for expert in sizes)
    return ModelNeeds(
        shape=replace(needs.shape, expert_bytes=tuple(size.at_rest for size in sizes)),
        experts=sizes,
        parameters=needs.parameters,
        bytes=replace(
            needs.bytes,
            slot_bytes=tuple(size.slot for size in sizes),
            staging=staging_plan(buffers).buffers * buffers if unified_memory else 0,
            workspace=workspace,
        ),
        forward=needs.forward,
    )


def _with_experts(config: PreTrainedConfig, name: str, count: int) -> PreTrainedConfig:
    """A copy of the configuration with `count` experts per layer. name: its name for that number."""
    config = copy.deepcopy(config)
    setattr(config.get_text_config(), name, count)
    return config


def _are_modules(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> bool:
    """Whether every expert is a module with parameters of its own."""
    try:
        places = [place for _, place in expert_parameters(build_meta(config, cls)).values()]
    except CheckpointError:  # the architecture does not allow so few experts
        return False
    return bool(places) and all(place.expert is not None for place in places)


def _extrapolated(two: ModelNeeds, three: ModelNeeds, count: int) -> ModelNeeds:
    """The needs with `count` experts, on the straight line through those with two and three."""

    def line(a: int, b: int) -> int:
        return a + (count - 2) * (b - a)

    layers = zip(two.bytes.layers, three.bytes.layers, strict=True)
    return ModelNeeds(
        shape=replace(two.shape, experts=(count,) * two.shape.layers),
        experts=two.experts,
        parameters=Parameters(*map(line, two.parameters, three.parameters)),
        bytes=replace(
            two.bytes,
            dense=line(two.bytes.dense, three.bytes.dense),
            layers=tuple(DenseLayerBytes(*map(line, a, b)) for a, b in layers),
        ),
        forward=two.forward,
    )


def estimate_experts(meta_model: PreTrainedModel, dtype: torch.dtype) -> tuple[CacheShape, tuple[ExpertBytes, ...]]:
    """Shape and expert bytes of every MoE layer of a model.

    Args:
        meta_model: the model on the meta device.
        dtype: dtype of experts at rest, unless they are quantized.

    Raises:
        UnsupportedModelError: the model has no experts, or a quantization whose bytes are not known.
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


def _expert(name: str, module: nn.Module, config: PreTrainedConfig, dtype: torch.dtype) -> ExpertBytes:
    """Bytes of one expert of the layer `module`, whose name is `name`."""
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
        halves = 2 if param.startswith("gate_up") else 1  # gate and up are stored apart, so no block contains both
        at_rest += halves * of_matrix(rows // halves, columns)
    components = 3 * len(shapes)
    slot = aligned(at_rest + components * PARAM_ALIGNMENT, PARAM_ALIGNMENT)
    return ExpertBytes(at_rest, slot, _read_bytes(at_rest, components), dense)


def _read_bytes(at_rest: int, runs: int) -> int:
    """Bytes of the pages that an expert touches if it stands in `runs` separate runs, the worst case."""
    return aligned(at_rest, ALIGNMENT) + 2 * runs * ALIGNMENT


def _matrix_bytes(config: PreTrainedConfig, name: str) -> MatrixBytes | None:
    """How many bytes the quantization stores a matrix of experts module `name` in; None if they are not quantized."""
    values, method = quantization_config(config) or {}, quantization_method(config)
    if method is None or any(_matches(str(entry), name) for key in IGNORED_LISTS for entry in _list(values.get(key))):
        return None
    if method == "fp8":
        block = [n for n in _list(values.get("weight_block_size")) if isinstance(n, int)]
        rows, columns = block if len(block) == 2 else (0, 0)
        return lambda m, n: m * n + 4 * (_blocks(m, rows) * _blocks(n, columns))
    if method == "mxfp4":
        return lambda m, n: m * _blocks(n, 32) * 17  # 16 bytes of codes and one exponent per 32 weights
    if method in ("gptq", "awq"):
        bits, group = _number(values, "bits", 4), _number(values, "group_size", 128)
        index = 4 if method == "gptq" else 0  # g_idx: int32 per column
        return lambda m, n: m * n * bits // 8 + _blocks(n, group) * (2 * m + m * bits // 8) + index * n
    if method == "compressed-tensors":
        weights = _compressed_weights(values)
        bits, group = _number(weights, "num_bits", 4), _number(weights, "group_size", 0)
        zeros = 0 if weights.get("symmetric", True) else bits / 8
        return lambda m, n: m * n * bits // 8 + int(m * _blocks(n, group) * (2 + zeros)) + 16  # 16: weight_shape
    raise UnsupportedModelError(
        f"how many bytes experts quantized by {method!r} take cannot be told from the configuration alone; "
        "download the checkpoint: its headers say it"
    )


def _compressed_weights(values: Mapping[str, object]) -> Mapping[str, object]:
    """The description of weights in the first group of a compressed-tensors config."""
    groups = values.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


def _matches(entry: str, name: str) -> bool:
    """Whether an entry of an ignore list names the module: a regular expression ("re:"), a glob, or part of a path."""
    if entry.startswith("re:"):
        return re.match(entry[3:], f"{name}.0.up_proj") is not None
    return fnmatch.fnmatchcase(name, entry) or f".{entry}." in f".{name}."


def _blocks(size: int, block: int) -> int:
    """Number of blocks in `size`, the last one may be smaller; 1 if `block` is 0."""
    return -(-size // block) if block > 0 else 1


def _number(values: Mapping[str, object], name: str, default: int) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else default


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else []

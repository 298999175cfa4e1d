"""Where every expert of a checkpoint is, and how its tensors become the parameters that its module computes with.

Nothing moves: the input is the checkpoint's headers and a model on the meta device. No architecture is known by name.
Experts modules are found by the attributes that transformers' registry sets; the checkpoint's names are mapped by the
loader's own renamings and converters, and what a converter does is worked out once per layer (convert.py). Work is
linear in the number of tensors: 90,000 names take seconds.

What it must never do: guess. An expert that is absent, of another shape or of mixed dtype is an error here, before
anything is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.hf.adapters import MappedName, expert_parameters, is_experts, map_names, steps
from offmoe.hf.convert import ExpertConversion, Group, Kind, Value, parts_of, trace, trace_share
from offmoe.hf.shares import divide, repeat_tied
from offmoe.runtime.checkpoint import Checkpoint
from offmoe.runtime.formats import Assembly, ExpertLayout, ExpertRecord, Part
from offmoe.types import CacheShape, ExpertKey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)
"""What architectures call the number of experts per token, as attributes of modules and of configs."""

COMPUTABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
OTHER_MODEL = "config.json and the shards are not of the same model"


@dataclass(frozen=True)
class CatalogLayer:
    """One MoE layer: `name` is the module path of its experts module, `records[e]` is expert e at rest."""

    name: str
    num_experts: int
    top_k: int
    layout: ExpertLayout
    assembly: Assembly
    records: tuple[ExpertRecord, ...]


@dataclass(frozen=True)
class ExpertCatalog:
    """Every expert of a checkpoint. `layers` in module order; `keys`: all tensor names that belong to experts."""

    layers: tuple[CatalogLayer, ...]
    keys: frozenset[str]

    @property
    def shape(self) -> CacheShape:
        """What decisions need to know. expert_bytes: at rest, which is what one fetch reads."""
        return CacheShape(
            experts=tuple(layer.num_experts for layer in self.layers),
            top_k=tuple(layer.top_k for layer in self.layers),
            expert_bytes=tuple(layer.records[0].nbytes for layer in self.layers),
        )

    @cached_property
    def records(self) -> dict[ExpertKey, ExpertRecord]:
        """The records of all layers by key."""
        return {
            ExpertKey(i, expert): record
            for i, layer in enumerate(self.layers)
            for expert, record in enumerate(layer.records)
        }


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Experts modules of a model by module path, in module order, which is the order of a forward."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def build_catalog(checkpoint: Checkpoint, meta_model: PreTrainedModel) -> ExpertCatalog:
    """Locate every expert of `meta_model` (meta device, experts not stripped) in `checkpoint`.

    Raises UnsupportedModelError (no experts, quantised, a conversion that mixes experts), MissingTensorError (naming
    the tensor) or CheckpointError (a tensor of another shape or dtype; dense tensors are held to the model's shapes
    too).
    """
    refuse_quantised(checkpoint.folder, meta_model.config)
    modules = find_experts(meta_model)
    if not modules:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: {type(meta_model).__name__} has no experts that offmoe can find (none of its "
            "modules is in transformers' experts registry); use a Mixture-of-Experts model such as Mixtral, "
            "Qwen-MoE, DeepSeek or gpt-oss"
        )
    owner = {f"{name}.{param}": name for name, module in modules.items() for param in expert_parameters(module)}
    groups: dict[str, dict[str, Group]] = {name: {} for name in modules}
    parameters = meta_model.state_dict()
    keys: set[str] = set()
    for mapped in map_names(meta_model, checkpoint.tensors):
        if mapped.target in owner:
            _collect(groups[owner[mapped.target]], mapped, checkpoint)
            keys.add(mapped.name)
        elif mapped.converter is None and mapped.target in parameters:
            _check_shape(checkpoint, mapped.name, tuple(parameters[mapped.target].shape))
            _check_computable(checkpoint, mapped.name, parameters[mapped.target])
    builder = _Builder(checkpoint, meta_model, groups)
    divide(groups, meta_model, builder.check_count)
    repeat_tied(groups, modules)
    return ExpertCatalog(tuple(builder.layer(name, module) for name, module in modules.items()), frozenset(keys))


def refuse_quantised(source: object, config: object) -> None:
    """Raise UnsupportedModelError if the config says that the checkpoint is quantised; `source` names it."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        asked = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        method = getattr(asked, "value", asked)
        raise UnsupportedModelError(
            f"{source}: quantised experts ({method}) cannot be run yet; use a bf16/fp16 checkpoint of the model"
        )


def find_top_k(module: nn.Module, block: nn.Module, config: object) -> int:
    """Experts per token of one layer, as its own modules say, or else a config.

    Asked in this order for any of TOP_K_NAMES: the experts module, the block it stands in, the block's other children
    (one of them is the router), the layer's config, the model's config.
    """
    for source in (module, block, *block.children(), getattr(module, "config", None), config):
        for name in TOP_K_NAMES:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise UnsupportedModelError(
        f"cannot tell how many experts per token {type(block).__name__} uses: neither its modules nor config.json "
        f"have any of {', '.join(TOP_K_NAMES)}"
    )


def _collect(groups: dict[str, Group], mapped: MappedName, checkpoint: Checkpoint) -> None:
    group = groups.setdefault(mapped.target, Group(mapped.target, mapped.converter))
    names = group.names.setdefault(mapped.pattern or mapped.name, [])
    if group.converter is not mapped.converter or (group.converter is None and len(group.names) > 1):
        first = next(iter(group.names.values()))[0]
        raise CheckpointError(
            f"{checkpoint.folder}: tensors {first!r} and {mapped.name!r} both become {mapped.target!r}; "
            "keep one of the two formats in the checkpoint"
        )
    names.append(mapped.name)


def _check_shape(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    info = checkpoint.tensors[name]
    if info.shape != expected:
        raise CheckpointError(
            f"{checkpoint.shards[info.shard]}: tensor {name!r} has shape {list(info.shape)}, the model expects "
            f"{list(expected)}; {OTHER_MODEL}"
        )


def _check_computable(checkpoint: Checkpoint, name: str, wanted: torch.Tensor) -> None:
    """transformers would cast whatever it finds, and compute with codes as if they were weights."""
    info = checkpoint.tensors[name]
    if wanted.is_floating_point() and info.dtype not in COMPUTABLE:
        raise UnsupportedModelError(
            f"{checkpoint.shards[info.shard]}: tensor {name!r} is {info.dtype}, which is no dtype to compute in; use a "
            "bf16/fp16 checkpoint of the model"
        )


@dataclass
class _Builder:
    """Turns the collected names of each layer into its catalog entry; equal layers share a layout and one trial."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    groups: dict[str, dict[str, Group]]
    layouts: dict[object, ExpertLayout] = field(default_factory=dict)
    tried: dict[object, dict[str, torch.dtype]] = field(default_factory=dict)
    traced: dict[object, Value] = field(default_factory=dict)

    def layer(self, name: str, module: nn.Module) -> CatalogLayer:
        shapes = {param: tuple(module.get_parameter(param).shape) for param in expert_parameters(module)}
        num_experts = next(iter(shapes.values()))[0]
        per_expert = {param: shape[1:] for param, shape in shapes.items()}
        groups = tuple(self.groups[name].values())
        self._check_present(name, tuple(shapes), groups)
        kinds = [[self._kind(group, names, num_experts) for names in group.names.values()] for group in groups]
        parts: list[Part] = []
        dtypes: dict[str, torch.dtype] = {}
        for group, kind in zip(groups, kinds, strict=True):
            param = group.target.rpartition(".")[2]
            dtypes[param] = self._one_dtype(group, kind)
            value = self._trace(group, kind, per_expert[param])
            if value is None:
                break
            self._check_tiling(group, kind, value, per_expert[param], num_experts)
            made = parts_of(param, value)
            if made is None:
                break
            parts += made
        if len(parts) == sum(len(group.names) for group in groups):
            assembly = Assembly(parts=tuple(parts))
        else:
            conversion = ExpertConversion(self.model, name, per_expert, groups)
            flat = [k for kind in kinds for k in kind]
            structure = (tuple((id(g.converter), g.per_expert) for g in groups), tuple(flat), tuple(per_expert.items()))
            if structure not in self.tried:
                self.tried[structure] = conversion.check(flat)
            dtypes = self.tried[structure]
            assembly = Assembly(convert=conversion)
        wanted = {param: (dtypes[param], shape) for param, shape in per_expert.items()}
        top_k = find_top_k(module, self.model.get_submodule(name.rpartition(".")[0]), self.model.config)
        if top_k > num_experts:
            raise CheckpointError(
                f"{self.checkpoint.folder}: config.json asks for {top_k} experts per token of the {num_experts} that "
                f"{name!r} has; download config.json again"
            )
        return CatalogLayer(
            name=name,
            num_experts=num_experts,
            top_k=top_k,
            layout=self.layouts.setdefault(tuple(wanted.items()), ExpertLayout.of(wanted)),
            assembly=assembly,
            records=self._records(groups, num_experts),
        )

    def _trace(self, group: Group, kinds: list[Kind], expected: tuple[int, ...]) -> Value | None:
        if group.share is None:
            return trace(group, [k.shape for k in kinds], (1, *expected))
        structure = (id(group.converter), group.share.number, tuple(kinds), expected)
        if structure not in self.traced:
            self.traced[structure] = trace_share(group, kinds, expected, self.model)
        return self.traced[structure]

    def _records(self, groups: Sequence[Group], num_experts: int) -> tuple[ExpertRecord, ...]:
        segment = self.checkpoint.segment
        sources = [(group.per_expert, names) for group in groups for names in group.names.values()]
        return tuple(
            ExpertRecord(tuple([segment(names[e]) if each else segment(names[0], e) for each, names in sources]))
            for e in range(num_experts)
        )

    def _check_present(self, name: str, params: Sequence[str], groups: Sequence[Group]) -> None:
        made = {target for group in groups for target in group.targets}
        for param in params:
            if f"{name}.{param}" in made:
                continue
            others = (g for layer in self.groups.values() for t, g in layer.items() if t.endswith(f".{param}"))
            other = next(others, None)
            hint = f" (in another layer it is {next(iter(other.names.values()))[0]!r})" if other else ""
            raise MissingTensorError(
                f"{self.checkpoint.folder}: no tensor of the checkpoint becomes {f'{name}.{param}'!r}{hint}; the "
                "download is incomplete, or the checkpoint is quantised or of another architecture"
            )

    def _kind(self, group: Group, names: list[str], num_experts: int) -> Kind:
        """What all tensors of one pattern are; an error if they are not one per expert, or not all alike."""
        infos = [self.checkpoint.tensors[name] for name in names]
        shape, dtype = Counter((info.shape, info.dtype) for info in infos).most_common(1)[0][0]
        if group.per_expert:
            if group.share is None:
                self.check_count(group, names, num_experts)
        elif shape[:1] != (num_experts,):
            raise CheckpointError(
                f"{self.checkpoint.shards[infos[0].shard]}: tensor {names[0]!r} has shape {list(shape)}, the model "
                f"expects [{num_experts}, ...], one row per expert; {OTHER_MODEL}"
            )
        for name, info in zip(names, infos, strict=True):
            if info.dtype not in COMPUTABLE:
                raise UnsupportedModelError(
                    f"{self.checkpoint.shards[info.shard]}: quantised experts ({name!r} is {info.dtype}) cannot be "
                    "run yet; use a bf16/fp16 checkpoint of the model"
                )
            if info.shape != shape:
                _check_shape(self.checkpoint, name, shape)
            if info.dtype != dtype:
                self._mixed(name, info.dtype, dtype)
        return Kind(shape if group.per_expert else shape[1:], dtype)

    def check_count(self, group: Group, names: list[str], num_experts: int) -> None:
        """An error unless there is one tensor for each expert, in their order."""
        if len(names) > num_experts:
            assert group.converter is not None
            if steps(group.converter) is None:
                raise UnsupportedModelError(
                    f"{self.checkpoint.folder}: {len(names)} tensors like {names[0]!r} make the {num_experts} "
                    f"experts of {group.target!r}, by a conversion that cannot be done one expert at a time; convert "
                    "the checkpoint with save_pretrained(save_original_format=False) of transformers first"
                )
            raise CheckpointError(
                f"{self.checkpoint.folder}: {len(names)} tensors like {names[-1]!r}, the model expects "
                f"{num_experts}, one per expert; {OTHER_MODEL}"
            )
        numbered = _numbered_like(names, num_experts)
        if len(names) < num_experts or (numbered and numbered != names):
            found = set(names)
            absent = [name for name in numbered if name not in found]
            which = f"tensor {absent[0]!r}" if absent else f"one of the tensors like {names[0]!r}"
            there = num_experts - len(absent) if absent else len(names)
            raise MissingTensorError(
                f"{self.checkpoint.folder}: the checkpoint has no {which} ({there} of {num_experts} experts there); "
                "complete the download"
            )

    def _check_tiling(
        self, group: Group, kinds: Sequence[Kind], value: Value, expected: tuple[int, ...], num_experts: int
    ) -> None:
        """The blocks must cover one expert's parameter exactly; blame the first tensor that prevents it."""
        axis = value.axis
        if value.shape == (1, *expected) and all(
            size == whole
            for block in value.blocks
            for i, (size, whole) in enumerate(zip(block.shape, value.shape, strict=True))
            if i != axis
        ):
            return
        absent = [p for p in group.converter.source_patterns if p not in group.names] if group.converter else []
        patterns = list(group.names)
        if absent:
            beside, tail = group.names[patterns[0]][0], patterns[0].rpartition("*")[2]
            name = beside.removesuffix(tail) + absent[0].rpartition("*")[2] if beside.endswith(tail) else absent[0]
            raise MissingTensorError(
                f"{self.checkpoint.folder}: the checkpoint has no tensor {name!r}, which {group.target!r} is made of "
                f"beside {beside!r}; complete the download"
            )
        for block in value.blocks:
            wanted = list(expected)
            if axis:
                wanted[axis - 1] //= len(value.blocks)
            if block.swapped:
                wanted[-2:] = wanted[:-3:-1]
            if kinds[block.source].shape != tuple(wanted):
                rows = () if group.per_expert else (num_experts,)
                _check_shape(self.checkpoint, group.names[patterns[block.source]][0], (*rows, *wanted))
        raise CheckpointError(
            f"{self.checkpoint.folder}: the tensors of {group.target!r} make {list(value.shape[1:])} per expert, the "
            f"model expects {list(expected)}; {OTHER_MODEL}"
        )

    def _one_dtype(self, group: Group, kinds: Sequence[Kind]) -> torch.dtype:
        for names, kind in zip(group.names.values(), kinds, strict=True):
            if kind.dtype != kinds[0].dtype:
                self._mixed(names[0], kind.dtype, kinds[0].dtype)
        return kinds[0].dtype

    def _mixed(self, name: str, found: torch.dtype, others: torch.dtype) -> None:
        raise CheckpointError(
            f"{self.checkpoint.shards[self.checkpoint.tensors[name].shard]}: tensor {name!r} is {found}, but belongs "
            f"to a parameter of {others}; save the checkpoint in one dtype"
        )


def _numbered_like(names: Sequence[str], num_experts: int) -> list[str]:
    """Names of all experts' tensors, from those of some: the number in which they differ is the expert."""
    split = [name.split(".") for name in names]
    same_length = len({len(fields) for fields in split}) == 1
    varying = [i for i, fields in enumerate(zip(*split, strict=False)) if len(set(fields)) > 1] if same_length else []
    if len(varying) != 1 or not all(fields[varying[0]].isdigit() for fields in split):
        return []
    at = varying[0]
    return [".".join((*split[0][:at], str(e), *split[0][at + 1 :])) for e in range(num_experts)]

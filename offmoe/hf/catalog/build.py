"""Build the catalog: find out which of a checkpoint's tensors hold which expert, from headers alone.

The input is the checkpoint's headers and the model on the meta device. No architecture is known by name. Adapters say
which parameters hold which experts; the loader's own renamings and converters map the checkpoint's names to parameters;
convert.py works out once per layer what a converter does. The work is linear in the number of tensors: 90,000 names
take seconds. An expert that is absent, of another shape or of mixed dtype is an error here, before anything is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.hf.adapters.find import expert_parameters, find_experts, find_top_k, require_adapter
from offmoe.hf.catalog.catalog import CatalogLayer, ExpertCatalog
from offmoe.hf.catalog.convert import ExpertConversion, Value, blocks_of, blocks_of_share, destinations_of
from offmoe.hf.catalog.dense_view import DenseView
from offmoe.hf.catalog.gguf_view import open_view
from offmoe.hf.catalog.groups import Group, Groups, check_count, collect, divide_shared_lists, repeat_tied_experts
from offmoe.hf.upstream import map_names
from offmoe.quant.codec import Kind
from offmoe.quant.raw_slot import RawSlot, raw_slot
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, ExpertRecord

COMPUTABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""The dtypes in which models can compute."""
OTHER_MODEL = "config.json and the shards are not of the same model"


def build_catalog(checkpoint: Checkpoint, meta_model: PreTrainedModel) -> ExpertCatalog:
    """Locate every expert of a model in its checkpoint.

    Args:
        checkpoint: the tensors at rest.
        meta_model: the model on the meta device, experts included.

    Raises:
        UnsupportedModelError: no experts, an unknown quantization, or a conversion that mixes experts.
        MissingTensorError: a tensor is absent; the message names it.
        CheckpointError: a tensor, dense ones included, has another shape or dtype than the model's.
    """
    try:
        return _build(checkpoint, meta_model)
    except MissingTensorError as error:
        if not checkpoint.misplaced or str(error).endswith(checkpoint.index_fault):
            raise
        raise MissingTensorError(f"{error}{checkpoint.index_fault}") from error


def _build(checkpoint: Checkpoint, meta_model: PreTrainedModel) -> ExpertCatalog:
    """`build_catalog`, whose errors know nothing of the index."""
    opened = open_view(checkpoint, meta_model.config)
    view = opened.view
    modules = find_experts(meta_model)
    if not modules:
        raise UnsupportedModelError(
            f"{checkpoint.model}: {type(meta_model).__name__} has no experts that offmoe can find (none of its "
            "modules is in transformers' experts registry or known to an adapter); use a Mixture-of-Experts model such "
            "as Mixtral, Qwen-MoE, DeepSeek or gpt-oss"
        )
    owned = expert_parameters(meta_model)
    groups: Groups = {name: {} for name in modules}
    parameters = meta_model.state_dict()
    keys: set[str] = set()
    dense: dict[str, str] = {}
    decoded: dict[str, str] = {}
    for mapped in map_names(meta_model, view.tensors, opened.converters):
        if mapped.target in owned:
            name, place = owned[mapped.target]
            collect(groups[name], mapped, name, place, checkpoint.model)
            keys.update(view.raw_names(mapped.name))
        elif mapped.converter is None and mapped.target in parameters:
            _check_shape(view, mapped.name, tuple(parameters[mapped.target].shape))
            if parameters[mapped.target].is_floating_point():
                _check_computable(view, mapped.name)
            (decoded if view.is_decoded(mapped.name) else dense)[mapped.target] = mapped.name
        elif opened.is_complete:
            raise UnsupportedModelError(
                f"{checkpoint.model}: tensor {mapped.name!r} has no place in {type(meta_model).__name__} with this "
                "configuration; offmoe does not know this variant of the model: use its safetensors checkpoint"
            )
    divide_shared_lists(groups, meta_model, checkpoint.model)
    repeat_tied_experts(groups, modules)
    builder = _Builder(view, meta_model, groups)
    layers = tuple(builder.layer(name, module) for name, module in modules.items())
    return ExpertCatalog(layers, frozenset(keys), frozenset(owned), dense, decoded, view)


def _check_shape(view: DenseView, name: str, expected: tuple[int, ...]) -> None:
    info = view.tensors[name]
    if info.shape != expected:
        raise CheckpointError(
            f"{view.where(name)}: tensor {name!r} has shape {list(info.shape)}, the model expects "
            f"{list(expected)}; {OTHER_MODEL}"
        )


def _check_computable(view: DenseView, name: str) -> None:
    """Refuse a tensor that is no weight: transformers would cast it and compute with codes as if they were weights."""
    dtype = view.tensors[name].dtype
    if dtype not in COMPUTABLE:
        raise UnsupportedModelError(
            f"{view.where(name)}: tensor {name!r} is {dtype}, no dtype to compute in, and nothing in the checkpoint "
            "says how to decode it; use a bf16/fp16 checkpoint of the model"
        )


@dataclass
class _Builder:
    """Turns the groups of each layer into its catalog entry."""

    view: DenseView
    model: PreTrainedModel
    groups: Groups
    layouts: dict[ExpertLayout, ExpertLayout] = field(default_factory=dict)
    """One object for all equal layouts."""
    converted: dict[object, dict[str, torch.dtype]] = field(default_factory=dict)
    """Conversions that passed their check, by structure -> the dtypes that they give. Equal layers check only once."""
    shared: dict[object, Value] = field(default_factory=dict)
    """Shares of divided lists, by structure -> what they become. Equal layers check only once."""

    def layer(self, name: str, module: nn.Module) -> CatalogLayer:
        adapter = require_adapter(module)
        num_experts, shapes = adapter.num_experts(module), adapter.shapes(module)
        groups = tuple(group.settled(num_experts) for group in self.groups[name].values())
        self._check_present(name, tuple(shapes), groups)
        for group in groups:
            self._set_kinds(group)
        kinds = [kind for group in groups for kind in group.kinds]
        assembly, dtypes = self._assembly(name, shapes, groups)
        if dtypes is None or any(kind.encoding for kind in kinds):
            slot = raw_slot(kinds, assembly, shapes)
        else:
            slot = RawSlot(ExpertLayout.of({param: (dtypes[param], shapes[param]) for param in shapes}), assembly, None)
        layer = CatalogLayer(
            name=name,
            num_experts=num_experts,
            top_k=self._top_k(name, module, num_experts),
            layout=self.layouts.setdefault(slot.layout, slot.layout),
            assembly=slot.assembly,
            records=self._records(groups),
            decode=slot.decode,
        )
        unlike = sorted({expert for group in groups for expert in group.unlike})
        return replace(
            layer, unlike={expert: self._unlike(layer, expert, groups, assembly, shapes) for expert in unlike}
        )

    def _unlike(
        self,
        layer: CatalogLayer,
        expert: int,
        groups: Sequence[Group],
        assembly: Assembly,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> CatalogLayer:
        """The layer as an expert stands in it that is stored otherwise than the rest: tensor by tensor, as stored.

        Args:
            layer: the layer as the rest stand in it.
            expert: the expert.
            groups: the layer's groups.
            assembly: makes parameters out of decoded tensors.
            shapes: the parameters' shapes by name.
        """
        slot = raw_slot([kind for g in groups for kind in g.unlike.get(expert, g.kinds)], assembly, shapes)
        layout = self.layouts.setdefault(slot.layout, slot.layout)
        return replace(layer, layout=layout, assembly=slot.assembly, decode=slot.decode)

    def _top_k(self, name: str, module: nn.Module, num_experts: int) -> int:
        top_k = find_top_k(module, self.model.get_submodule(name.rpartition(".")[0]), self.model.config)
        if top_k > num_experts:
            raise CheckpointError(
                f"{self.view.folder}: config.json asks for {top_k} experts per token of the {num_experts} that "
                f"{name!r} has; download config.json again"
            )
        return top_k

    def _assembly(
        self, name: str, shapes: dict[str, tuple[int, ...]], groups: tuple[Group, ...]
    ) -> tuple[Assembly, dict[str, torch.dtype] | None]:
        """How an expert of the layer `name` is assembled, and the dtype of each parameter.

        None in place of dtypes: tensors of several dtypes become one parameter.
        """
        destinations: list[Destination] = []
        dtypes: dict[str, torch.dtype] = {}
        mixed = any(len({kind.dtype for kind in group.kinds if kind.encoding is None}) > 1 for group in groups)
        for group in groups:
            param = group.target.removeprefix(f"{name}.")
            dtypes[param] = next((k.dtype for k in group.kinds if k.encoding is None), group.kinds[0].dtype)
            value = self._blocks(group, shapes[param])
            if value is not None:
                self._check_tiling(group, value, shapes[param])
            copies = None if value is None else destinations_of(param, value)
            if copies is None or len(copies) < len(group.names):  # transformers' own operations are needed
                conversion = ExpertConversion(self.model, name, shapes, groups)
                structure = (tuple((id(g.converter), g.per_expert, g.kinds) for g in groups), tuple(shapes.items()))
                if structure not in self.converted:
                    self.converted[structure] = conversion.check()
                return Assembly(convert=conversion), None if mixed else self.converted[structure]
            destinations += copies
        return Assembly(destinations=tuple(destinations)), None if mixed else dtypes

    def _blocks(self, group: Group, expected: tuple[int, ...]) -> Value | None:
        """The group's parameter for one expert as blocks, [1, ...]; None if it does not consist of blocks."""
        if group.share is None:
            return blocks_of(group, (1, *expected))
        structure = (id(group.converter), group.share.number, group.kinds, expected)
        if structure not in self.shared:
            self.shared[structure] = blocks_of_share(group, expected, self.model)
        return self.shared[structure]

    def _records(self, groups: Sequence[Group]) -> tuple[ExpertRecord, ...]:
        """The segments of every expert, in the order of the groups."""
        segments = self.view.segments
        sources = [
            (names, None if group.per_expert else self._entries(group, names[0]))
            for group in groups
            for names in group.names.values()
        ]
        by_expert = (
            [segments(names[0], e, n) if n else segments(names[e]) for names, n in sources]
            for e in range(groups[0].num_experts)
        )
        return tuple(ExpertRecord(tuple(chain.from_iterable(parts))) for parts in by_expert)

    def _entries(self, group: Group, name: str) -> int:
        """Number of experts in a stacked tensor, including those behind the last expert that the model has."""
        return group.num_experts if self.view.tensors[name].shape[:1] != (group.entries,) else group.entries or 0

    def _check_present(self, name: str, params: Sequence[str], groups: Sequence[Group]) -> None:
        """Check that every parameter of one expert has tensors."""
        targets = {target for group in groups for target in group.targets}
        for param in params:
            if f"{name}.{param}" in targets:
                continue
            others = (g for layer in self.groups.values() for t, g in layer.items() if t.endswith(f".{param}"))
            other = next(others, None)
            hint = f" (in another layer it is {next(iter(other.names.values()))[0]!r})" if other else ""
            raise MissingTensorError(
                f"{self.view.folder}: no tensor of the checkpoint becomes {f'{name}.{param}'!r}{hint}; the "
                "download is incomplete, or the checkpoint is quantized or of another architecture"
            )

    def _set_kinds(self, group: Group) -> None:
        """Set the kinds that most experts' tensors are of, and those of experts that are unlike them."""
        by_pattern = [self._kinds(group, names) for names in group.names.values()]
        if all(
            kind == kinds[0] for kinds in by_pattern for kind in kinds
        ):  # hashing 90,000 of them takes half a second
            group.kinds = tuple(kinds[0] for kinds in by_pattern)
            return
        group.kinds = tuple(Counter(kinds).most_common(1)[0][0] for kinds in by_pattern)
        for expert, own in enumerate(zip(*by_pattern, strict=True)):
            if own != group.kinds:
                group.unlike[expert] = own
                for names, kind in zip(group.names.values(), group.kinds, strict=True):
                    self.view.check_components(names[expert], kind.encoding)

    def _kinds(self, group: Group, names: list[str]) -> list[Kind]:
        """The kind of each tensor of one pattern; an error if they differ in shape."""
        infos = [self.view.tensors[name] for name in names]
        shape = Counter(info.shape for info in infos).most_common(1)[0][0]
        entries = self._entries(group, names[0])
        if group.per_expert:
            if group.share is None:
                check_count(self.view.folder, group, names, group.num_experts)
            of_one = shape
        elif not shape or not shape[0] or shape[0] % entries:
            raise CheckpointError(
                f"{self.view.where(names[0])}: tensor {names[0]!r} has shape {list(shape)}, the model "
                f"expects [{group.num_experts}, ...], equal parts for all experts; {OTHER_MODEL}"
            )
        else:
            of_one = shape[1:] if shape[0] == entries else (shape[0] // entries, *shape[1:])
        for name, info in zip(names, infos, strict=True):
            _check_computable(self.view, name)
            if info.shape != shape:
                _check_shape(self.view, name, shape)
        rows = None if group.per_expert else entries
        return [
            Kind(of_one, info.dtype, self.view.encoding(name, rows)) for name, info in zip(names, infos, strict=True)
        ]

    def _check_tiling(self, group: Group, value: Value, expected: tuple[int, ...]) -> None:
        """Check that the blocks cover one expert's parameter exactly; else name the first tensor that is wrong."""
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
            present, tail = group.names[patterns[0]][0], patterns[0].rpartition("*")[2]
            name = present.removesuffix(tail) + absent[0].rpartition("*")[2] if present.endswith(tail) else absent[0]
            raise MissingTensorError(
                f"{self.view.folder}: the checkpoint has no tensor {name!r}, which {group.target!r} is made of "
                f"beside {present!r}; complete the download"
            )
        for block in value.blocks:
            wanted = list(expected)
            if axis:
                wanted[axis - 1] //= len(value.blocks)
            if block.swapped:
                wanted[-2:] = wanted[:-3:-1]
            if group.kinds[block.source].shape != tuple(wanted):
                name = group.names[patterns[block.source]][0]
                if not group.per_expert and len(self.view.tensors[name].shape) == len(wanted):
                    wanted[0] *= group.num_experts
                elif not group.per_expert:
                    wanted.insert(0, group.num_experts)
                _check_shape(self.view, name, tuple(wanted))
        raise CheckpointError(
            f"{self.view.folder}: the tensors of {group.target!r} make {list(value.shape[1:])} per expert, the "
            f"model expects {list(expected)}; {OTHER_MODEL}"
        )

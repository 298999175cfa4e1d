"""Group the checkpoint's tensors by the parameter of an experts module that they become.

A group is complete only if it has one tensor per expert, or one tensor with a row for every expert. Some checkpoints
keep one list of tensors for the experts of several modules; the list is divided here. That the converter really divides
it so is checked in convert.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.hf.adapters.base import Place
from offmoe.hf.adapters.find import require_adapter
from offmoe.hf.upstream import MappedName, MergeModulelist, WeightConverter, steps
from offmoe.quant.codec import Kind


class Share(NamedTuple):
    """One of the equal shares into which a converter divides a list of experts."""

    number: int
    """Which share, from 0."""
    targets: tuple[str, ...]
    """Full names of the parameters that the shares become, in order."""


@dataclass
class Group:
    """The checkpoint's tensors that become one parameter of an experts module, by a converter or by a renaming."""

    target: str
    """Full name of the parameter."""
    converter: WeightConverter | None
    """The conversion; None if the tensors are only renamed."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Tensor names by source pattern, in the loader's order: one per expert, or a single one with all experts' rows."""
    owned: dict[int, str] = field(default_factory=dict)
    """Tensor name by expert, if the model itself has a parameter per expert. `settled` moves them to `names`."""
    entries: int | None = None
    """Number of experts in the tensors, if it is more than num_experts. Those behind the last expert are ignored."""
    kinds: tuple[Kind, ...] = ()
    """Per source pattern, what its tensors have in common."""
    unlike: dict[int, tuple[Kind, ...]] = field(default_factory=dict)
    """Per expert whose tensors are not of these kinds: the kinds of its own."""
    num_experts: int = 0
    """Number of experts of the module, once the group is `settled`."""
    share: Share | None = None
    """Set if the converter makes the experts of several modules from one list; `names` holds this module's share."""

    def settled(self, num_experts: int) -> Group:
        """The group once all tensors are known: `owned` in expert order among `names`, tensors of no expert dropped."""
        self.num_experts = num_experts
        if self.owned:
            self.names[self.target] = [self.owned[expert] for expert in sorted(self.owned)]
        for pattern, names in self.names.items():
            if len(names) == self.entries:
                self.names[pattern] = names[:num_experts]
        return self

    @property
    def per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        if self.owned:
            return True
        if self.converter is None:
            return False
        known = steps(self.converter)
        stacks = known is not None and isinstance(known[0], MergeModulelist)
        return stacks or any(len(names) > 1 for names in self.names.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """Full names of all parameters that the group becomes; `target` is the first."""
        if self.converter is None or self.share is not None:
            return (self.target,)
        patterns = self.converter.target_patterns
        return tuple(self.target.replace(patterns[0], pattern) for pattern in patterns)


Groups = dict[str, dict[str, Group]]
"""The groups by experts module and parameter; both keys are full names."""


def collect(groups: dict[str, Group], mapped: MappedName, layer: str, place: Place, folder: Path) -> None:
    """Add a tensor of the checkpoint to the group of the parameter that it becomes.

    Args:
        groups: the groups of the experts module `layer`.
        mapped: the tensor and its parameter.
        layer: the experts module's full name.
        place: what the parameter holds.
        folder: the checkpoint, for messages.

    Raises:
        CheckpointError: another tensor becomes the same part of the parameter.
    """
    target, expert = f"{layer}.{place.param}", place.expert
    group = groups.setdefault(target, Group(target, mapped.converter, entries=place.entries))
    if expert is None:
        first = next((names[0] for names in group.names.values()), None)
        twice = group.converter is None and first is not None
    else:
        first = group.owned.get(expert)
        twice = first is not None
    if twice or group.converter is not mapped.converter:
        raise CheckpointError(
            f"{folder}: tensors {first!r} and {mapped.name!r} both become {mapped.target!r}; "
            "keep one of the two formats in the checkpoint"
        )
    if expert is None:
        group.names.setdefault(mapped.pattern or mapped.name, []).append(mapped.name)
    else:
        group.owned[expert] = mapped.name


def divide_shared_lists(groups: Groups, model: PreTrainedModel, folder: Path) -> None:
    """Give every module its own share of a list of experts that one converter divides among several modules."""
    for module in list(groups):
        for target, group in list(groups[module].items()):
            owners = [share.rpartition(".")[0] for share in group.targets]
            if len(set(owners)) == 1 or not all(owner in groups for owner in owners):
                continue
            sizes = [int(model.get_parameter(share).shape[0]) for share in group.targets]
            del groups[module][target]
            for names in group.names.values():
                check_count(folder, group, names, sum(sizes))
            for i, (owner, share) in enumerate(zip(owners, group.targets, strict=True)):
                start = sum(sizes[:i])
                own = {pattern: names[start : start + sizes[i]] for pattern, names in group.names.items()}
                groups[owner][share] = Group(share, group.converter, own, share=Share(i, group.targets))


def repeat_tied_experts(groups: Groups, modules: Mapping[str, nn.Module]) -> None:
    """Repeat a group for every module whose parameters are tied to it: a checkpoint names tied tensors only once."""
    first: dict[int, tuple[str, str]] = {}
    for name in sorted(modules, key=lambda name: not groups[name]):
        adapter = require_adapter(modules[name])
        for param, place in adapter.places(modules[name]).items():
            target = f"{name}.{place.param}"
            owner, source = first.setdefault(id(modules[name].get_parameter(param)), (name, target))
            if owner != name and source in groups[owner]:
                groups[name][target] = replace(groups[owner][source], target=target)


def check_count(folder: Path, group: Group, names: list[str], num_experts: int) -> None:
    """Check that there is one tensor per expert, in their order.

    Args:
        folder: the checkpoint, for messages.
        group: the group of the tensors.
        names: the tensors of one source pattern.
        num_experts: how many there should be.

    Raises:
        MissingTensorError: there are fewer, or one is missing among them.
        CheckpointError: there are more.
        UnsupportedModelError: there are more, and the conversion cannot be done one expert at a time.
    """
    if len(names) > num_experts:
        assert group.converter is not None
        if steps(group.converter) is None:
            raise UnsupportedModelError(
                f"{folder}: {len(names)} tensors like {names[0]!r} make the {num_experts} "
                f"experts of {group.target!r}, by a conversion that cannot be done one expert at a time; convert "
                "the checkpoint with save_pretrained(save_original_format=False) of transformers first"
            )
        raise CheckpointError(
            f"{folder}: {len(names)} tensors like {names[-1]!r}, the model expects "
            f"{num_experts}, one per expert; config.json and the shards are not of the same model"
        )
    numbered = _numbered_like(names, num_experts)
    if len(names) < num_experts or (numbered and numbered != names):
        present = set(names)
        absent = [name for name in numbered if name not in present]
        which = f"tensor {absent[0]!r}" if absent else f"one of the tensors like {names[0]!r}"
        count = num_experts - len(absent) if absent else len(names)
        raise MissingTensorError(
            f"{folder}: the checkpoint has no {which} ({count} of {num_experts} experts there); complete the download"
        )


def _numbered_like(names: Sequence[str], num_experts: int) -> list[str]:
    """All experts' tensor names, from some of them: the one number in which the names differ is the expert's.

    Empty if the names do not differ in exactly one number.
    """
    fields = [re.split(r"(\d+)", name) for name in names]  # text and numbers in turn
    same_length = len(set(map(len, fields))) == 1
    varying = [i for i, values in enumerate(zip(*fields, strict=False)) if len(set(values)) > 1] if same_length else []
    if len(varying) != 1 or varying[0] % 2 == 0:
        return []
    before, after = fields[0][: varying[0]], fields[0][varying[0] + 1 :]
    return ["".join((*before, str(expert), *after)) for expert in range(num_experts)]

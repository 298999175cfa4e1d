"""Lists of tensors, one per expert: whether they are whole, and those that are of more than one module's experts.

Nothing moves: names are handed from one module to another before any of them is looked at. Must never hand a module
names that are not its own; that a list really is divided as assumed here is tried in convert.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.hf.adapters.find import require_adapter
from offmoe.hf.catalog.convert import Group, Share
from offmoe.hf.upstream import steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Groups = dict[str, dict[str, Group]]
"""By experts module and parameter, full names both."""


def divide(groups: Groups, model: PreTrainedModel, folder: Path) -> None:
    """Give every module its own share of a list of experts that one converter divides among several modules."""
    for module in list(groups):
        for target, group in list(groups[module].items()):
            owners = [made.rpartition(".")[0] for made in group.targets]
            if len(set(owners)) == 1 or not all(owner in groups for owner in owners):
                continue
            sizes = [int(model.get_parameter(made).shape[0]) for made in group.targets]
            del groups[module][target]
            for names in group.names.values():
                check_count(folder, group, names, sum(sizes))
            for i, (owner, made) in enumerate(zip(owners, group.targets, strict=True)):
                start = sum(sizes[:i])
                own = {pattern: names[start : start + sizes[i]] for pattern, names in group.names.items()}
                groups[owner][made] = Group(made, group.converter, own, share=Share(i, group.targets))


def repeat_tied(groups: Groups, modules: Mapping[str, nn.Module]) -> None:
    """A module whose parameters are those of another has the same experts; a checkpoint names them once."""
    first: dict[int, tuple[str, str]] = {}
    for name in sorted(modules, key=lambda name: not groups[name]):
        adapter = require_adapter(modules[name])
        for param, place in adapter.places(modules[name]).items():
            target = f"{name}.{place.param}"
            owner, source = first.setdefault(id(modules[name].get_parameter(param)), (name, target))
            if owner != name and source in groups[owner]:
                groups[name][target] = replace(groups[owner][source], target=target)


def check_count(folder: Path, group: Group, names: list[str], num_experts: int) -> None:
    """Raise CheckpointError unless names are one tensor per expert, in their order."""
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
        found = set(names)
        absent = [name for name in numbered if name not in found]
        which = f"tensor {absent[0]!r}" if absent else f"one of the tensors like {names[0]!r}"
        there = num_experts - len(absent) if absent else len(names)
        raise MissingTensorError(
            f"{folder}: the checkpoint has no {which} ({there} of {num_experts} experts there); complete the download"
        )


def _numbered_like(names: Sequence[str], num_experts: int) -> list[str]:
    """Names of all experts' tensors, from those of some: the number in which they differ is the expert."""
    split = [name.split(".") for name in names]
    same_length = len({len(fields) for fields in split}) == 1
    varying = [i for i, fields in enumerate(zip(*split, strict=False)) if len(set(fields)) > 1] if same_length else []
    if len(varying) != 1:
        return []
    at = varying[0]
    before, after = split[0][:at], split[0][at + 1 :]
    label = split[0][at].rstrip("0123456789")
    if not all(fields[at].startswith(label) and fields[at][len(label) :].isdigit() for fields in split):
        return []
    return [".".join((*before, f"{label}{e}", *after)) for e in range(num_experts)]

"""Tensors that belong to the experts of more than one module: lists that a converter divides, and tied parameters.

Nothing moves: names are handed from one module to another before any of them is looked at. Must never hand a module
names that are not its own; that a list really is divided as assumed here is tried in convert.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from offmoe.hf.adapters import expert_parameters
from offmoe.hf.convert import Group, Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Groups = dict[str, dict[str, Group]]
"""By experts module and parameter, full names both."""


def divide(groups: Groups, model: PreTrainedModel, check_count: Callable[[Group, list[str], int], None]) -> None:
    """Give every module its own share of a list of experts that one converter divides among several modules.

    check_count(group, names, number): raises unless names are one per expert, `number` in all.
    """
    for module in list(groups):
        for target, group in list(groups[module].items()):
            owners = [made.rpartition(".")[0] for made in group.targets]
            if len(set(owners)) == 1 or not all(owner in groups for owner in owners):
                continue
            sizes = [int(model.get_parameter(made).shape[0]) for made in group.targets]
            del groups[module][target]
            for names in group.names.values():
                check_count(group, names, sum(sizes))
            for i, (owner, made) in enumerate(zip(owners, group.targets, strict=True)):
                start = sum(sizes[:i])
                own = {pattern: names[start : start + sizes[i]] for pattern, names in group.names.items()}
                groups[owner][made] = Group(made, group.converter, own, Share(i, group.targets))


def repeat_tied(groups: Groups, modules: Mapping[str, nn.Module]) -> None:
    """A module whose parameters are those of another has the same experts; a checkpoint names them once."""
    first: dict[int, str] = {}
    for name in sorted(modules, key=lambda name: not groups[name]):
        for param in expert_parameters(modules[name]):
            source = first.setdefault(id(modules[name].get_parameter(param)), f"{name}.{param}")
            owner = source.rpartition(".")[0]
            if owner != name and source in groups[owner]:
                target = f"{name}.{param}"
                groups[name][target] = replace(groups[owner][source], target=target)

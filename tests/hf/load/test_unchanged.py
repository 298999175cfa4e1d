"""Whatever somebody does to modules is seen, and nothing else is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offmoe.hf.load.unchanged import Unchanged


class Block(nn.Module):
    """A module as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2, bias=False)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("table", torch.zeros(3))
        self.top_k, self.scaling, self.config = 2, 0.5, {"attention": "sdpa"}


def parent() -> Any:
    with torch.no_grad():
        return nn.ModuleDict({"block": Block()}).eval().requires_grad_(False)


def look(tree: Any) -> Unchanged:
    block = tree["block"]
    return Unchanged(tree, [block, *block.children()], [(block.config, "attention")])


def replaced(block: Any) -> None:
    block.gate.weight = nn.Parameter(block.gate.weight * 2, requires_grad=False)


def moved(block: Any) -> None:
    block.gate.weight.data = block.gate.weight.data.clone()


def written(block: Any) -> None:
    block.table.add_(1)


def hooked(block: Any) -> None:
    block.norm.register_forward_pre_hook(lambda *_: None)


def another(block: Any) -> None:
    block.norm = nn.Identity()


def forward(block: Any) -> None:
    block.gate.forward = lambda x: x


def number(block: Any) -> None:
    block.top_k = 1


def floating(block: Any) -> None:
    block.scaling = 0.25


def mode(block: Any) -> None:
    block.norm.train()


def setting(block: Any) -> None:
    block.config["attention"] = "eager"


CHANGES = [replaced, moved, written, hooked, another, forward, number, floating, mode, setting]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: Callable[[Any], None]) -> None:
    tree = parent()
    unchanged = look(tree)
    assert unchanged.holds()
    change(tree["block"])
    assert not unchanged.holds()


def test_the_parents_hooks_and_submodules_count() -> None:
    for change in (
        lambda tree: tree.register_forward_hook(lambda *_: None),
        lambda tree: tree.__setitem__("block", Block()),
    ):
        tree = parent()
        unchanged = look(tree)
        change(tree)
        assert not unchanged.holds()


def test_running_the_modules_changes_nothing() -> None:
    tree = parent()
    unchanged = look(tree)
    tree["block"].norm(tree["block"].gate.weight)
    handle = tree["block"].register_forward_hook(lambda *_: None)
    handle.remove()
    assert unchanged.holds()


def test_a_parent_that_holds_it_can_be_freed() -> None:
    tree = parent()
    object.__setattr__(tree, "forward", look(tree))
    reference = weakref.ref(tree)
    gc.disable()
    del tree
    gc.enable()
    assert reference() is None


def test_hooks_that_are_there_are_no_change_and_keep_nothing_alive() -> None:
    tree = parent()
    held = tree

    def hook(*_: object) -> None:
        assert held

    handle = tree["block"].norm.register_forward_pre_hook(hook)
    unchanged = look(tree)
    assert unchanged.holds()
    other = tree["block"].norm.register_forward_pre_hook(lambda *_: None)
    assert not unchanged.holds()
    other.remove()
    assert unchanged.holds()
    handle.remove()
    assert not unchanged.holds()
    reference = weakref.ref(hook)
    del hook
    assert reference() is None

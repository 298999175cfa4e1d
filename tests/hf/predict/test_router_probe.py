"""Routes found by watching one forward pass: exact for every family, and none where a router needs more."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offmoe.hf.adapters.find import find_experts
from offmoe.hf.predict.route_recorder import RouteRecorder
from offmoe.hf.predict.router_probe import OTHER_WIDTH
from tests import tiny


def experts_of(model: tiny.Model) -> list[nn.Module]:
    return list(find_experts(model).values())


def forward(model: tiny.Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def routed(experts: list[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """The ids that each layer's experts get during `run`."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[1].clone())) for m in experts]
    run()
    for hook in hooks:
        hook.remove()
    return [seen[module] for module in experts]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_own_residual_reproduces_the_ids_on_another_prompt(family: str) -> None:
    model = tiny.build(family, torch.bfloat16)
    experts = experts_of(model)
    before = hooks_of(model)
    probe = tiny.watch(model, experts, lambda: forward(model, tiny.prompt(1, 4, seed=1)))
    assert hooks_of(model) == before
    assert all(probe.can_predict(layer) for layer in range(len(experts)))

    residuals: dict[int, Tensor] = {}
    handles = probe.install(lambda layer, residual: residuals.__setitem__(layer, residual))
    ids = routed(experts, lambda: forward(model, tiny.prompt(2, 13, seed=9)))
    for handle in handles:
        handle.remove()
    assert hooks_of(model) == before
    assert [residuals[layer].shape for layer in range(len(experts))] == [(2, 13, 32)] * len(experts)
    for layer, wanted in enumerate(ids):
        found = probe.predict(layer, residuals[layer])
        assert found.dtype == torch.int64
        assert torch.equal(found, wanted)
    across = probe.predict(1, residuals[0])  # what prefetching does
    assert across.shape == (26, tiny.TOP_K)


def test_residual_is_kept_before_the_layers_experts_run() -> None:
    model = tiny.build("mixtral")
    experts = experts_of(model)
    probe = tiny.watch(model, experts, lambda: forward(model, tiny.prompt()))
    order: list[tuple[str, int]] = []
    probe.install(lambda layer, _: order.append(("residual", layer)))
    for layer, module in enumerate(experts):
        module.register_forward_pre_hook(lambda *_, layer=layer: order.append(("experts", layer)))
    forward(model, tiny.prompt())
    assert order == [(what, layer) for layer in range(3) for what in ("residual", "experts")]


def test_watching_changes_nothing_and_holds_nothing() -> None:
    model = tiny.build("qwen2_moe")
    wanted = forward(model, tiny.prompt())
    alive: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        module.register_forward_hook(
            lambda _m, _a, out: alive.append(weakref.ref(out)) if isinstance(out, Tensor) else None
        )
    recorder = RouteRecorder(model, experts_of(model))
    recorder.start()
    logits = forward(model, tiny.prompt())
    assert torch.equal(logits, wanted)
    del logits
    gc.collect()
    assert len(alive) > 20
    assert not [ref for ref in alive if ref() is not None]  # even before finish
    probe = recorder.finish()
    assert all(probe.can_predict(layer) for layer in range(3))
    assert not recorder._calls


def test_failed_forward_leaves_no_hooks() -> None:
    model = tiny.build("mixtral")

    def broken() -> None:
        forward(model, tiny.prompt())
        raise RuntimeError("out of coffee")

    with pytest.raises(RuntimeError, match="coffee"):
        tiny.watch(model, experts_of(model), broken)
    assert hooks_of(model) == 0


def test_layer_that_was_not_called_cannot_be_predicted() -> None:
    model = tiny.build("mixtral")
    experts = experts_of(model)
    probe = tiny.watch(model, [*experts, nn.Linear(1, 1)], lambda: forward(model, tiny.prompt()))
    assert [probe.can_predict(layer) for layer in range(4)] == [True, True, True, False]
    assert len(probe.install(lambda *_: None)) == 3


class Experts(nn.Module):
    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden


class Router(nn.Module):
    """Top-2 of a projection plus a bias argument."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 4, bias=False)

    def forward(
        self, hidden: Tensor, bias: Tensor | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = self.proj(hidden)
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else scores * mask
        return scores, scores.topk(2, dim=-1).indices


class Block(nn.Module):
    """residual -> norm -> dropout -> router, with the router called in one of several ways."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.norm, self.dropout, self.router, self.experts = nn.LayerNorm(8), nn.Dropout(0.0), Router(), Experts()
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, residual: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(residual)).view(-1, 8)
        if self.style == "parameter":
            ids = self.router(hidden, self.bias)[1]
        elif self.style == "keyword":
            ids = self.router(hidden=hidden, bias=self.bias)[1]
        elif self.style == "none":
            ids = self.router(hidden, None, mask=None)[1]
        elif self.style == "per call":
            ids = self.router(hidden, hidden.mean(0)[:4])[1]
        elif self.style == "per call keyword":
            ids = self.router(hidden, mask=torch.ones(4))[1]
        elif self.style == "cast":
            ids = self.router(hidden)[1].to(torch.int32)
        else:  # something between router and experts changes the ids in place
            ids = self.router(hidden)[1]
            ids.fill_(0)
        return residual + self.experts(hidden, ids).view_as(residual)


@pytest.mark.parametrize("style", ["parameter", "keyword", "none"])
def test_constant_extra_arguments_are_repeated(style: str) -> None:
    torch.manual_seed(0)
    block = Block(style)
    probe = tiny.watch(block, [block.experts], lambda: block(torch.randn(2, 3, 8)))
    assert probe.can_predict(0)
    route = probe.routes[0]
    assert route is not None
    assert route.norm is block.norm
    other = torch.randn(1, 5, 8)
    (wanted,) = routed([block.experts], lambda: block(other))
    assert torch.equal(probe.predict(0, other), wanted)


@pytest.mark.parametrize("style", ["per call", "per call keyword", "cast", "changed"])
def test_router_that_needs_more_than_the_residual_is_not_trusted(style: str) -> None:
    torch.manual_seed(0)
    block = Block(style)
    probe = tiny.watch(block, [block.experts], lambda: block(torch.randn(2, 3, 8)))
    assert not probe.can_predict(0)


def test_residual_that_the_model_drops_still_has_a_route() -> None:
    """Post-norm residuals: the norm's input is freed before the experts run."""

    class PostNorm(Block):
        def forward(self, residual: Tensor) -> Tensor:
            normed = self.norm(residual * 2)
            return normed + self.experts(normed, self.router(normed)[1])

    torch.manual_seed(0)
    block = PostNorm("post")
    probe = tiny.watch(block, [block.experts], lambda: block(torch.randn(6, 8)))
    assert probe.can_predict(0)
    assert probe.taps[0] is block.norm


def test_memory_that_was_given_back_is_not_taken_for_a_norm() -> None:
    """The router reads the residual itself, which stands where a leaf's output stood before."""
    memory = np.zeros((6, 8), np.float32)

    def placed(tensor: Tensor) -> Tensor:
        memory[:] = tensor.numpy()
        return torch.from_numpy(memory)

    class Leaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return placed(x + 1)

    class Reused(Block):
        def forward(self, residual: Tensor) -> Tensor:
            self.norm(residual)
            hidden = placed(residual * 2)
            return hidden + self.experts(hidden, self.router(hidden)[1])

    torch.manual_seed(0)
    block: Any = Reused("")
    block.norm = Leaf()
    with torch.no_grad():
        probe = tiny.watch(block, [block.experts], lambda: block(torch.randn(6, 8)))
    assert probe.routes[0] is not None
    assert probe.routes[0].norm is None
    assert probe.taps[0] is block.router


def test_residuals_of_two_widths_predict_nothing_from_each_other() -> None:
    class PerHead(Block):
        def forward(self, residual: Tensor) -> Tensor:
            hidden = self.norm(residual.view(-1, 2, 4)).view(-1, 8)
            return residual + self.experts(hidden, self.router(hidden)[1])

    torch.manual_seed(0)
    first, second = PerHead(""), Block("none")
    first.norm = nn.LayerNorm(4)
    model = nn.Sequential(first, second)
    probe = tiny.watch(model, [first.experts, second.experts], lambda: model(torch.randn(6, 8)))
    assert not probe.can_predict(1)
    assert probe.reasons[1] == OTHER_WIDTH

"""Every compute waits for a slot before it reads it, and gives every expert its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from offmoe.compute.compute import LayerInput, Slotted
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.gpu_compute import GpuCompute
from offmoe.compute.kernels import torch_ffn
from offmoe.compute.kernels.device import DeviceKernels
from offmoe.compute.kernels.gguf import GgufDecoder
from offmoe.compute.kernels.torch_ffn import GatedFFN, concatenate
from offmoe.compute.torch_compute import TorchCompute
from offmoe.device.arena import SlotArena
from offmoe.device.backend import CpuBackend
from offmoe.quant.decode import ExpertDecoding, Leaf
from offmoe.quant.gguf_formats import GgufBlocks
from offmoe.storage.layout import PARAM_ALIGNMENT, Assembly, Destination, ExpertLayout
from tests import native
from tests.quant.test_gguf_formats import random_blocks

LAYOUT = ExpertLayout.of({"w": (torch.float32, (1,))})


def scaled(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return x * weights["w"]


SCALED = ExpertLayer(0, LAYOUT, Assembly(), scaled)


def filling(fill: Callable[[int], object], arriving: Mapping[int, Any] | None = None) -> Any:
    """A transfer engine whose slots `fill` fills when they are waited for. arriving: by slot, the expert on its way."""
    coming = arriving or {}

    def divide(experts: Sequence[Slotted]) -> tuple[list[Slotted], list[Slotted]]:
        return [pair for pair in experts if pair[1] not in coming], [pair for pair in experts if pair[1] in coming]

    return SimpleNamespace(ready=fill, arriving=coming.get, divide=divide)


def test_an_expert_is_read_once_its_slot_is_ready() -> None:
    arena = SlotArena(CpuBackend().allocate, [LAYOUT] * 3)
    compute = TorchCompute(arena, torch.float32)

    def ready(slot: int) -> None:
        arena.views(slot, LAYOUT)["w"].fill_(slot + 1.0)

    hidden = torch.tensor([[1.0], [10.0], [100.0]])
    pairs = {4: torch.tensor([0, 5]), 2: torch.tensor([3])}  # of [3 * 2]
    made = list(compute.wave(SCALED, [(4, 2), (2, 0)], LayerInput(hidden, pairs, 2), filling(ready)))
    assert [(list(experts), rows.tolist()) for experts, rows in made] == [
        ([(4, 2)], [[3.0], [300.0]]),
        ([(2, 0)], [[10.0]]),
    ]
    alone = list(compute.wave(SCALED, [(4, 1)], LayerInput(hidden[:1], None, 2), filling(ready)))
    assert alone[0][1].tolist() == [[2.0]]


WIDE, INNER = 96, 160


class Trickling:
    """An expert that arrives block by block, each when it is waited for, in a slot of NaN."""

    def __init__(self, views, weights):
        self.views, self.weights, self.waited = views, weights, []
        for view in views.values():
            view.fill_(float("nan"))

    def wait(self, name, start, end):
        self.waited.append((name, start, end))
        view, weight = (w[name].view(-1).view(torch.uint8) for w in (self.views, self.weights))
        view[start:end] = weight[start:end]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_expert_is_computed_with_as_it_arrives(monkeypatch, dtype, biased, threads) -> None:
    monkeypatch.setattr(torch_ffn, "BLOCK_BYTES", 1)  # the smallest blocks
    shapes = {"up": (2 * INNER, WIDE), "down": (WIDE, INNER)} | (
        {"up_bias": (2 * INNER,), "down_bias": (WIDE,)} if biased else {}
    )
    layout = ExpertLayout.of({name: (dtype, shape) for name, shape in shapes.items()})
    arena = SlotArena(CpuBackend().allocate, [layout])
    compute, views = TorchCompute(arena, torch.float32), arena.views(0, layout)
    math = GatedFFN("up", lambda h: F.silu(h[:, :INNER]) * h[:, INNER:], biased, down="down")
    layer = ExpertLayer(0, layout, Assembly(), math)
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for turn in range(3):
            torch.manual_seed(turn)
            weights = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
            x = torch.randn(1, WIDE).to(dtype)
            coming = Trickling(views, weights)
            done: list[int] = []
            ((_, rows),) = compute.wave(layer, [(5, 0)], LayerInput(x, None, 2), filling(done.append, {0: coming}))
            assert torch.equal(rows, math(weights, x))
            assert done, "it is asked at the end whether something went wrong"
            blocks = [-(-size // 64) for size in (2 * INNER, WIDE)]
            assert len(coming.waited) == sum(blocks) + 2 * biased
    finally:
        torch.set_num_threads(used)


class Off(GatedFFN):
    """A math whose blocks do not give the bits of the whole."""

    def as_it_arrives(self, weights, x, wait):
        return super().as_it_arrives(weights, x, wait) + 1


def test_what_does_not_have_the_same_bits_by_blocks_is_computed_whole() -> None:
    layout = ExpertLayout.of({"up": (torch.float32, (INNER, WIDE)), "down": (torch.float32, (WIDE, INNER))})
    arena = SlotArena(CpuBackend().allocate, [layout])
    compute, views = TorchCompute(arena, torch.float32), arena.views(0, layout)
    weights = {name: torch.randn(view.shape) for name, view in views.items()}
    layer, x = ExpertLayer(0, layout, Assembly(), Off("up", F.relu, down="down")), torch.randn(1, WIDE)

    def fill(slot: int) -> None:
        for name, view in views.items():
            view.copy_(weights[name])

    for turn in range(2):
        coming = Trickling(views, weights)
        ((_, rows),) = compute.wave(layer, [(5, 0)], LayerInput(x, None, 2), filling(fill, {0: coming}))
        assert torch.equal(rows, F.relu(x @ weights["up"].T) @ weights["down"].T)
        assert bool(coming.waited) is (turn == 0)


def test_a_wave_without_experts_gives_no_rows() -> None:
    """The first wave of a layer without a hit is empty if the host computes its misses; GPU kernels must accept it."""
    arena = SlotArena(CpuBackend().allocate, [LAYOUT])
    by_torch = TorchCompute(arena, torch.float32)
    kernels = SimpleNamespace(most_pairs=1)  # which launch nothing here
    for compute in (by_torch, GpuCompute({0: cast("DeviceKernels", kernels)}, arena)):
        either: tuple[Any, ...] = (None, {})
        for pairs in either:
            assert not list(compute.wave(SCALED, [], LayerInput(torch.ones(1, 1), pairs, 1), filling(print)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_any_dtype_are_put_together_under_autocast(dtype: torch.dtype, autocast: torch.dtype) -> None:
    parts = torch.randn(3, 2, 4).to(dtype)
    with torch.autocast("cpu", dtype=autocast):
        rows = concatenate(list(parts))
    assert rows.dtype == dtype
    assert torch.equal(rows, parts.flatten(0, 1))


@native.installed
def test_experts_of_a_gguf_file_are_decoded_into_memory_that_is_kept() -> None:
    blocks = ExpertLayout.of({"0.blocks": (torch.uint8, (4, 34)), "1.blocks": (torch.uint8, (6, 34))})
    leaves = tuple(Leaf(GgufBlocks(8), {"blocks": p.name}, (p.shape[0], 32)) for p in blocks.params)
    destinations = (Destination("w", 0, 0), Destination("v", 0, 0))
    decode = ExpertDecoding(leaves, Assembly(destinations), {"w": (4, 32), "v": (6, 32)})
    seen = []

    def math(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        seen.append({name: w.data_ptr() for name, w in weights.items()})
        return F.linear(F.linear(x, weights["w"]), weights["v"][:, :4])

    arena = SlotArena(CpuBackend().allocate, [blocks] * 2)
    layer = ExpertLayer(0, blocks, Assembly(), math, decode=decode)
    compute = TorchCompute(arena, torch.bfloat16, GgufDecoder(native.library(), 1))
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    for slot in (0, 1, 0):
        views = arena.views(slot, blocks)
        for i, view in enumerate(views.values()):
            view.copy_(random_blocks(8, len(view), 1, seed=slot + 2 * i))
        assert torch.equal(compute.expert(layer, slot, x), math(decode(views, torch.bfloat16), x))
    kept = seen[::2]
    assert kept[0] == kept[1] == kept[2]
    assert all(address % PARAM_ALIGNMENT == 0 for address in kept[0].values())
    compute.close()

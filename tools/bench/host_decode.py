"""Measures what the host does for one MoE layer of one decoded token while every expert has a slot.

The layers have Qwen3-30B-A3B's numbers: 128 experts, 8 of them per token, inputs of 2048. Experts are as narrow as
kernels allow, because what they compute is not what is measured. Ids are on the host.

device    The executor with the GPU kernels; launches return at once, and memory is the host's.
cpu       The executor with the C kernels, which return at once. call: what a layer's calls of the real kernels take
          for experts of 32 x 64, with their threads.
alone     The executor at lag 1, whose kernels need nothing of the host: launches return at once, and what the device
          would log is there. It launches, reads the log, plans, counts and names the next victims. miss: half of the
          experts have slots, and the others are in pinned RAM.
plan      The planner alone.
ask       From asking for experts in pinned RAM to the end of their copies' issue, for one and for eight experts.
build     Planner, slots, tickets and kernels for 24,576 slots, in seconds.

Prints medians over layers, of rounds in turn; with --json one last line with them.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
from safetensors.torch import save_file

from offmoe.compute.compute import ExpertCompute
from offmoe.compute.cpu_compute import CpuCompute
from offmoe.compute.cpu_slot import cpu_slot
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.gpu_compute import GpuCompute, RoutedForm
from offmoe.compute.kernels.cpu import CpuKernels, Glu
from offmoe.compute.kernels.device import DeviceKernels
from offmoe.compute.kernels.library import status
from offmoe.compute.kernels.operands import GatedOperands, float_operand
from offmoe.compute.kernels.torch_ffn import GatedFFN
from offmoe.compute.torch_compute import TorchCompute
from offmoe.config import CacheOptions
from offmoe.device.arena import SlotArena
from offmoe.device.backend import Backend, CpuBackend
from offmoe.device.cores import usable_cores
from offmoe.policy.planner import build_planner
from offmoe.runtime.device_decode import DeviceDecode
from offmoe.runtime.device_tables import DeviceTables
from offmoe.runtime.executor import ExpertExecutor
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, ExpertRecord
from offmoe.storage.store import ExpertStore
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.types import Access, CacheShape, CacheStats, ExpertKey, Fetch, single_demands

LAYERS, EXPERTS, TOP_K, HIDDEN = 2, 128, 8, 2048
MANY_SLOTS = 24576
STEP_LAYERS = 40
"""Layers between two ends of a step, where the host waits for the device's log."""


class Pinned(CpuBackend):
    """RAM as if it were a device's: RAM slots are pinned, and copies are done when they have been issued."""

    unified_memory = False

    def pin(self, address: int, nbytes: int) -> bool:
        return True


class AtOnce:
    """The functions of the library of C kernels; those that compute return at once, with the same arguments."""

    def __init__(self, calls: Any) -> None:
        self._calls, self._libm = calls, "libm.so.6"

    def __getattr__(self, name: str) -> Any:
        original = getattr(self._calls, name)
        if not name.startswith("offmoe_expert"):
            return original
        function = ctypes.CDLL(self._libm).fegetround  # takes nothing, and returns 0
        function.argtypes = original.argtypes
        setattr(self, name, function)
        return function


class Rig:
    """Every part of a runtime for layers of bf16 experts [HIDDEN, inner], all resident."""

    def __init__(self, folder: Path, inner: int, hidden: int = HIDDEN) -> None:
        self.hidden, folder = hidden, folder / f"{hidden}-{inner}"
        folder.mkdir()
        up, down = torch.randn(2 * inner, hidden) * 0.02, torch.randn(hidden, inner) * 0.02
        tensors = {f"{e}.{n}": w.bfloat16() for e in range(EXPERTS) for n, w in (("up", up), ("down", down))}
        save_file(tensors, folder / "model.safetensors")
        checkpoint = Checkpoint.open(folder)
        segments = [tuple(checkpoint.segment(f"{e}.{n}") for n in ("up", "down")) for e in range(EXPERTS)]
        keys = [ExpertKey(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
        self.layout = ExpertLayout.of(
            {"gate_up_proj": (torch.bfloat16, (2 * inner, hidden)), "down_proj": (torch.bfloat16, (hidden, inner))}
        )
        self.assembly = Assembly((Destination("gate_up_proj", 0, 0), Destination("down_proj", 0, 0)))
        self.records = {key: ExpertRecord(segments[key.expert]) for key in keys}
        self.store = ExpertStore(checkpoint.shards, self.records)
        self.shape = CacheShape((EXPERTS,) * LAYERS, (TOP_K,) * LAYERS, (self.layout.nbytes,) * LAYERS)
        self.math = GatedFFN("gate_up_proj", _silu_gate)
        self.closing: list[Callable[[], None]] = [self.store.close]

    def layers(self, *, for_c: bool) -> list[ExpertLayer]:
        slot = None
        if for_c:
            slot = cpu_slot(self.layout, self.assembly, None, self.records[ExpertKey(0, 0)].segments, self.math)
        return [ExpertLayer(i, self.layout, self.assembly, self.math, cpu_slot=slot) for i in range(LAYERS)]

    def executor(
        self, layers: list[ExpertLayer], compute: Callable[[SlotArena], ExpertCompute]
    ) -> Callable[[int], float]:
        """A function that runs layer i of a token and gives its seconds; every expert is resident."""
        backend, planner = CpuBackend(), build_planner(CacheOptions(slots_per_layer=EXPERTS), self.shape)
        arena = SlotArena(backend.allocate, [self.layout] * planner.num_slots)
        transfer = TransferEngine(SlotWriter(self.store, arena, backend, layers))
        computing, stats = compute(arena), CacheStats.for_layers(LAYERS)
        executor = ExpertExecutor(planner, transfer, computing, backend, stats)
        self.closing += [computing.close, transfer.close]
        everything = torch.arange(EXPERTS).view(-1, TOP_K)
        for layer in layers:
            executor.run(layer, torch.randn(len(everything), self.hidden, dtype=torch.bfloat16), everything)
        chance = torch.Generator().manual_seed(0)
        ids = [torch.randperm(EXPERTS, generator=chance)[:TOP_K][None] for _ in range(64)]
        hidden = torch.randn(1, self.hidden, dtype=torch.bfloat16)
        misses = executor.stats.misses

        def run(i: int) -> float:
            began = time.perf_counter()
            executor.run(layers[i % LAYERS], hidden, ids[i % 64])
            took = time.perf_counter() - began
            assert executor.stats.misses == misses
            return took

        return run

    def close(self) -> None:
        for close in reversed(self.closing):
            close()


def _silu_gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def on_device(layers: list[ExpertLayer], arena: SlotArena) -> ExpertCompute:
    """The GPU kernels, whose launches return at once."""
    up, down = (float_operand(param) for param in layers[0].layout.params)
    inner = up.rows // 2
    operands = GatedOperands(up.part(inner, 0), up.part(inner, inner), down)
    kernels = {
        layer.index: DeviceKernels(
            operands, Glu(), arena.memory, arena.starts, launch=lambda *launch: None, upload=torch.from_numpy
        )
        for layer in layers
    }
    return GpuCompute(kernels, arena)


def alone(rig: Rig, slots: int) -> Callable[[int], float]:
    """A function that runs layer i of a token without the host in the way and gives its seconds.

    slots: per layer. Experts without one are in pinned RAM, so the device places them.
    """
    backend, layers = Pinned(), rig.layers(for_c=False)
    options = CacheOptions(slots_per_layer=slots, host_slots=EXPERTS if slots < EXPERTS else 0, lag=1)
    planner = build_planner(options, rig.shape)
    arena = SlotArena(backend.allocate, [rig.layout] * planner.num_slots)
    transfer = TransferEngine(SlotWriter(rig.store, arena, backend, layers), host_slots=planner.num_host_slots)
    up, down = (float_operand(param) for param in rig.layout.params)
    operands = GatedOperands(up.part(up.rows // 2, 0), up.part(up.rows // 2, up.rows // 2), down)
    row = np.zeros(3 + TOP_K, dtype=np.int32)

    def launch(kernel: Any, *_: object) -> None:
        if kernel.__name__ == "assign":  # what it would log
            ring[progress[0] % len(ring)] = row
            progress[0] += 1

    tables = DeviceTables([RoutedForm(operands, Glu(), 2)] * LAYERS, rig.shape, transfer, backend, launch)
    ring, progress = tables.state.log.ring.numpy(), tables.state.log.progress.numpy()
    decode = DeviceDecode(tables, transfer, backend)
    stats = CacheStats.for_layers(LAYERS)
    executor = ExpertExecutor(planner, transfer, on_device(layers, arena), backend, stats, decode=decode)
    rig.closing += [transfer.close, decode.close]
    everything = torch.arange(EXPERTS).view(-1, TOP_K)
    for layer in layers:
        executor.run(layer, torch.randn(len(everything), rig.hidden, dtype=torch.bfloat16), everything)
    while transfer.host.pin_progress.running:
        time.sleep(0.001)
    chance = torch.Generator().manual_seed(0)
    ids = [torch.randperm(EXPERTS, generator=chance)[:TOP_K][None] for _ in range(64)]
    hidden, weights = torch.randn(1, rig.hidden, dtype=torch.bfloat16), torch.rand(1, TOP_K)

    def run(i: int) -> float:
        layer, routed = i % LAYERS, ids[i % 64]
        experts = routed[0].tolist()
        row[:] = (layer, 0, len(planner.missing(layer, experts)), *experts)
        read = stats.disk_bytes
        began = time.perf_counter()
        executor.run_summed(layers[layer], hidden, routed, weights)
        if i % STEP_LAYERS == STEP_LAYERS - 1:
            executor.end_step()
        took = time.perf_counter() - began
        assert stats.disk_bytes == read
        return took

    return run


def by_c(arena: SlotArena, threads: int, *, at_once: bool) -> ExpertCompute:
    """The C kernels. at_once: without computing anything."""
    library = status().library
    assert library is not None, status().message
    if at_once:
        library = copy.copy(library)
        calls: Any = AtOnce(library.calls)
        library.calls = calls
    kernels = CpuKernels(library, threads, int8_activations=False)
    return CpuCompute(kernels, arena, TorchCompute(arena, torch.bfloat16))


def plans(shape: CacheShape) -> Callable[[int], float]:
    """A function that plans a layer of a token and gives its seconds; every expert is resident."""
    planner = build_planner(CacheOptions(slots_per_layer=EXPERTS), shape)
    for layer in range(LAYERS):
        planner.plan(Access(layer, single_demands(range(EXPERTS), EXPERTS), 1))
    chance = torch.Generator().manual_seed(0)
    ids = [torch.randperm(EXPERTS, generator=chance)[:TOP_K].tolist() for _ in range(64)]
    accesses = [Access(i % LAYERS, single_demands(ids[i], EXPERTS), 1) for i in range(64)]

    def run(i: int) -> float:
        began = time.perf_counter()
        planner.plan(accesses[i % 64])
        return time.perf_counter() - began

    return run


def asks(rig: Rig, count: int) -> Callable[[int], float]:
    """A function that fetches experts from RAM slots and gives the seconds until their copies are issued."""
    backend: Backend = Pinned()
    arena = SlotArena(backend.allocate, [rig.layout] * (2 * count))
    engine = TransferEngine(SlotWriter(rig.store, arena, backend, rig.layers(for_c=False)), host_slots=2 * count)
    rig.closing.append(engine.close)
    while engine.host.pin_progress.running:  # else readers would copy through staging
        time.sleep(0.001)

    def fetch(i: int, read: bool) -> float:
        slots = range(count * (i % 2), count * (i % 2 + 1))
        fetches = [Fetch(ExpertKey(0, slot), slot, None, host=slot, read=read) for slot in slots]
        began = time.perf_counter()
        engine.fetch(fetches)
        for slot in slots:
            engine.ready(slot)
        took = time.perf_counter() - began
        engine.computed(slots)
        return took

    for i in range(2):
        fetch(i, True)
    return lambda i: fetch(i, False)


def build_s(rig: Rig) -> float:
    """Seconds to build what plans and carries out for MANY_SLOTS slots."""
    layers = MANY_SLOTS // EXPERTS
    shape = CacheShape((EXPERTS,) * layers, (TOP_K,) * layers, (rig.layout.nbytes,) * layers)
    tiny = ExpertLayout.of({"weight": (torch.uint8, (16,))})
    backend = CpuBackend()
    began = time.perf_counter()
    planner = build_planner(CacheOptions(slots_per_layer=EXPERTS), shape)
    arena = SlotArena(backend.allocate, [tiny] * planner.num_slots)
    bound = [ExpertLayer(i, tiny, rig.assembly, rig.math) for i in range(layers)]
    engine = TransferEngine(SlotWriter(rig.store, arena, backend, bound))
    stats = CacheStats.for_layers(layers)
    compute = TorchCompute(arena, torch.bfloat16)
    ExpertExecutor(planner, engine, compute, backend, stats)
    took = time.perf_counter() - began
    engine.close()
    return took


def measured(rounds: int, threads: int) -> dict[str, float]:
    """Medians in microseconds; in seconds if the name ends with _s."""
    with tempfile.TemporaryDirectory() as folder:
        narrow = Rig(Path(folder), 32)
        smallest = Rig(Path(folder), 32, hidden=64)
        for_c = narrow.layers(for_c=True)
        runs: dict[str, Callable[[int], float]] = {
            "device_us": narrow.executor(layers := narrow.layers(for_c=False), lambda a: on_device(layers, a)),
            "alone_us": alone(narrow, EXPERTS),
            "alone_miss_us": alone(narrow, EXPERTS // 2),
            "cpu_us": narrow.executor(for_c, lambda a: by_c(a, threads, at_once=True)),
            "plan_us": plans(narrow.shape),
            "ask_1_us": asks(smallest, 1),
            "ask_8_us": asks(smallest, 8),
        }
        small_c = smallest.layers(for_c=True)
        real = smallest.executor(small_c, lambda a: by_c(a, threads, at_once=False))
        stub = smallest.executor(small_c, lambda a: by_c(a, threads, at_once=True))
        pair = {"real": real, "stub": stub}
        times: dict[str, list[float]] = {name: [] for name in (*runs, *pair)}
        for _ in range(rounds):
            for name, run in (runs | pair).items():
                for i in range(40):
                    took = run(i)
                    if i >= 8:
                        times[name].append(took)
        figures = {name: round(statistics.median(times[name]) * 1e6, 1) for name in runs}
        call = statistics.median(times["real"]) - statistics.median(times["stub"])
        figures["call_us"] = round(call * 1e6, 1)
        figures["build_s"] = round(min(build_s(narrow) for _ in range(3)), 3)
        for rig in (narrow, smallest):
            rig.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of the C kernels (default: the cores)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        figures = measured(arguments.rounds, arguments.threads)
    for name, figure in figures.items():
        print(f"{name:12} {figure:9.3f}" if name.endswith("_s") else f"{name:12} {figure:9.1f}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()

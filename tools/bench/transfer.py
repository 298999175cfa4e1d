"""Measures the transfer engine on a disk: prompts through few slots, and demands behind prefetches, in paired runs.

Experts of one bf16 matrix (25 MB) go from a synthetic checkpoint to slots in RAM. There are two questions:

prefill  A layer of 8 experts goes through 4 slots, 4 tokens each (about as long to multiply as to read). Requesting all
         waves at once is compared with one wave at a time; the plans are the same. Reading alone (one wave at a time)
         and computing alone are measured too.
queue    How long a demand takes behind 30 queued prefetches, compared with a lone read.

Prints a table; with --json one last line {"prefill_gain" (time apart / time streamed - 1, median and 95 % interval),
"vs_bound" (time streamed / the longer of reading and computing), "queue_ratio" (median, worst)}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401
import torch
from safetensors.torch import save_file

from offmoe.config import CacheOptions
from offmoe.device.arena import SlotArena
from offmoe.device.backend import CpuBackend
from offmoe.policy.planner import build_planner
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, ExpertRecord
from offmoe.storage.store import ExpertStore
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.types import Access, CacheShape, Demand, ExpertKey, Fetch, Plan

LAYERS, EXPERTS, SLOTS, TOKENS = 4, 8, 4, 4
ROWS, HIDDEN = 12288, 1024
EXPERT_BYTES = 2 * ROWS * HIDDEN
QUEUED = 30


def write(folder: Path) -> Checkpoint:
    for layer in range(LAYERS):
        matrix = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16)
        path = folder / f"model-{layer}.safetensors"
        save_file({f"{layer}.{e}": matrix + e for e in range(EXPERTS)}, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # so that nothing is written while something is measured
        os.close(descriptor)
    names = {f"{k}.{e}": f"model-{k}.safetensors" for k in range(LAYERS) for e in range(EXPERTS)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return Checkpoint.open(folder)


class Layer(NamedTuple):
    """How slots hold the experts of a layer."""

    layout: ExpertLayout
    assembly: Assembly

    def of(self, expert: int) -> Layer:
        """All experts stand alike."""
        return self


class Rig:
    """Store, slots and engine for `slots` experts of any layer."""

    def __init__(self, checkpoint: Checkpoint, slots: int):
        self.keys = [ExpertKey(k, e) for k in range(LAYERS) for e in range(EXPERTS)]
        records = {key: ExpertRecord((checkpoint.segment(f"{key.layer}.{key.expert}"),)) for key in self.keys}
        self.layout = ExpertLayout.of({"weight": (torch.bfloat16, (ROWS, HIDDEN))})
        self.backend = CpuBackend()
        self.store = ExpertStore(checkpoint.shards, records)
        self.arena = SlotArena(self.backend.allocate, [self.layout] * slots)
        layer = Layer(self.layout, Assembly((Destination("weight", 0, 0),)))
        self.engine = TransferEngine(SlotWriter(self.store, self.arena, self.backend, [layer] * LAYERS))
        self.hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)

    def compute(self, slot: int) -> None:
        torch.nn.functional.linear(self.hidden, self.arena.views(slot, self.layout)["weight"])

    def close(self) -> None:
        self.engine.close()
        self.store.close()


def streamed(rig: Rig, plan: Plan) -> None:
    rig.engine.stream(plan.waves)
    for wave in plan.waves:
        for _, slot in wave.experts:
            rig.engine.ready(slot)
            rig.compute(slot)
            rig.engine.computed((slot,))


def apart(rig: Rig, plan: Plan) -> None:
    for wave in plan.waves:
        streamed(rig, plan._replace(waves=(wave,)))


def reading(rig: Rig, plan: Plan) -> None:
    for wave in plan.waves:
        rig.engine.stream([wave])
        for _, slot in wave.experts:
            rig.engine.ready(slot)
        rig.engine.computed([slot for _, slot in wave.experts])


def computing(rig: Rig, plan: Plan) -> None:
    for wave in plan.waves:
        for _, slot in wave.experts:
            rig.compute(slot)


def prompt_s(rig: Rig, execute: Callable[[Rig, Plan], None]) -> float:
    """Seconds of a second prompt through all layers, after the first has filled the slots."""
    shape = CacheShape((EXPERTS,) * LAYERS, (2,) * LAYERS, (EXPERT_BYTES,) * LAYERS)
    planner = build_planner(CacheOptions(slots_per_layer=SLOTS), shape)
    everything = tuple(Demand(e, TOKENS, TOKENS) for e in range(EXPERTS))
    for layer in range(LAYERS):
        streamed(rig, planner.plan(Access(layer, everything, TOKENS)))
    began = time.perf_counter()
    for layer in range(LAYERS):
        execute(rig, planner.plan(Access(layer, everything, TOKENS)))
    return time.perf_counter() - began


def prefill(checkpoint: Checkpoint, rounds: int) -> dict[str, object]:
    rig = Rig(checkpoint, LAYERS * SLOTS)
    ways = (streamed, apart, reading, computing)
    gains: list[float] = []
    bounds: list[float] = []
    print("round   streamed s   one wave at a time s   reading alone s   computing alone s   gain")
    try:
        for _ in range(rounds):
            took = {way.__name__: prompt_s(rig, way) for way in random.sample(ways, len(ways))}
            gains.append(took["apart"] / took["streamed"] - 1)
            bounds.append(took["streamed"] / max(took["reading"], took["computing"]))
            print(
                f"{len(gains):5d}   {took['streamed']:10.3f}   {took['apart']:20.3f}   {took['reading']:15.3f}"
                f"   {took['computing']:17.3f}   {gains[-1]:+.3f}"
            )
    finally:
        rig.close()
    low, high = interval(gains)
    print(f"median gain {statistics.median(gains):+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    return {
        "prefill_gain": round(statistics.median(gains), 3),
        "prefill_gain_interval": [round(low, 3), round(high, 3)],
        "vs_bound": round(statistics.median(bounds), 3),
    }


def interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the median, by resampling."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


def demand_s(rig: Rig, queued: int) -> float:
    """Seconds of one demand behind prefetches of other experts."""
    keys = random.sample(rig.keys, queued + 1)
    rig.engine.prefetch([Fetch(key, slot, None) for slot, key in enumerate(keys[1:])])
    if queued:
        time.sleep(0.02)  # the prefetches are under way when the demand comes
    began = time.perf_counter()
    rig.engine.fetch([Fetch(keys[0], queued, None)])
    rig.engine.ready(queued)
    took = time.perf_counter() - began
    rig.engine.forget()
    return took


def queue(checkpoint: Checkpoint, rounds: int) -> dict[str, object]:
    rig = Rig(checkpoint, QUEUED + 1)
    try:
        demand_s(rig, 0)  # slots are touched for the first time
        pairs = [(demand_s(rig, QUEUED), demand_s(rig, 0)) for _ in range(rounds)]
    finally:
        rig.close()
    lone = statistics.median(alone for _, alone in pairs)
    ratios = [behind / lone for behind, _ in pairs]
    print(
        f"demand behind {QUEUED} prefetches: {1e3 * statistics.median(b for b, _ in pairs):.1f} ms, alone "
        f"{1e3 * lone:.1f} ms; ratio {statistics.median(ratios):.2f}, worst {max(ratios):.2f} of {rounds}"
    )
    return {"queue_ratio": round(statistics.median(ratios), 2), "queue_ratio_worst": round(max(ratios), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The transfer engine: prompts in waves, demands behind prefetches.")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to write 0.8 GB (default: here)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="offmoe-transfer-", dir=arguments.dir) as folder:
        checkpoint = write(Path(folder))
        figures = {**prefill(checkpoint, arguments.rounds), **queue(checkpoint, 3 * arguments.rounds)}
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Would the workspace of prefill be worth more as slots while decoding?

First the sizes: how many experts the workspace of published models holds, as planned and for chunks of a given size.
Then what so many slots are worth: a recording is replayed with a pool, with the pool enlarged while no prompt is
prefilled (`Planner.resize` between the steps; the lent slots are empty again after every prompt), and with the pool
enlarged for good. Prints two tables.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

from offmoe.budget.inspect import Survey, survey
from offmoe.config import CacheOptions, OffloadConfig
from offmoe.policy.planner import build_planner
from offmoe.simulate.replay import Recording
from offmoe.text import format_size
from offmoe.trace.trace import read_trace
from offmoe.types import CacheStats

DATA = Path(__file__).parents[2] / "tests" / "data"
MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3")
CHUNKS = (512, 2048)
SHARES = (1 / 8, 1 / 4, 1 / 2)
LENT = (1, 4, 16, 64)


def idle_bytes(model: Survey) -> int:
    """Bytes of the workspace that a decoding step of one sequence does not use."""
    needs = model.needs
    return model.plan.workspace - needs.temporary - needs.forward.of(1, 1, 4096, 1)


def sizes(name: str) -> dict[str, Any]:
    """How many experts fit in what decoding leaves of the workspace."""
    row: dict[str, Any] = {"model": name}
    for chunk in (None, *CHUNKS):
        model = survey(
            DATA / "configs" / f"{name}.json",
            OffloadConfig(device="cpu", prefill_chunk=chunk, max_context=8192, device_memory="2TiB"),
        )
        slot = max(model.needs.bytes.slot_bytes)
        row |= {"experts": model.shape.num_keys, "slot": slot}
        row["planned" if chunk is None else str(chunk)] = (idle_bytes(model), idle_bytes(model) / slot)
    return row


def count(recording: Recording, slots: int, while_decoding: int, while_prefilling: int) -> CacheStats:
    """Replay with slots lent while decoding, while prefilling, both (for good) or neither."""
    shape = recording.trace.shape
    options = CacheOptions(scope="model", slots_per_layer=shape.spread(slots))
    planner, stats, lent = build_planner(options, shape), CacheStats.for_layers(shape.layers), 0
    request = -1
    for step in recording.steps:
        # Where only decoding was recorded, the first token of a request stands for its prompt.
        wanted = while_prefilling if step.rows > 1 or step.request != request else while_decoding
        request = step.request
        if wanted != lent:
            planner.resize(replace(options, slots_per_layer=shape.spread(slots + wanted)))
            lent = wanted
        for access in step.accesses:
            stats.add(planner.plan(access), shape)
    return stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path, default=DATA / "gptoss20b_6req.npz", help="a recording")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    found = [sizes(name) for name in MODELS]
    print(f"{'model':<16}{'experts':>9}{'slot':>10}" + "".join(f"{c:>24}" for c in ("planned", *map(str, CHUNKS))))
    for row in found:
        cells = [row[key] for key in ("planned", *map(str, CHUNKS))]
        text = "".join(f"{f'{format_size(size)} = {slots:.2f} slots':>24}" for size, slots in cells)
        print(f"{row['model']:<16}{row['experts']:>9}{format_size(row['slot']):>10}{text}")
    recording = Recording(read_trace(args.trace))
    print(f"\n{args.trace.stem}: bytes read with lent slots, relative to none (lent while decoding / for good)")
    print(f"{'slots':>8}{'hit rate':>10}" + "".join(f"{f'{lent} lent':>18}" for lent in LENT))
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        slots = round(share * recording.trace.shape.num_keys)
        base = count(recording, slots, 0, 0)
        rows.append({"slots": slots, "hit_rate": base.hit_rate, "lent": {}})
        text = f"{slots:>8}{base.hit_rate:>10.3f}"
        for lent in LENT:
            pair = [count(recording, slots, lent, always).disk_bytes / base.disk_bytes for always in (0, lent)]
            rows[-1]["lent"][lent] = pair
            text += f"{pair[0]:>11.4f} /{pair[1]:.3f}"
        print(text)
    if args.json:
        print(json.dumps({"sizes": found, "replays": rows}))


if __name__ == "__main__":
    main()

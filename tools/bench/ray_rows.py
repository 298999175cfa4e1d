#!/usr/bin/env python3
"""What Ray costs per row: the demo model answers the same lines in this process and on one worker of a local cluster.

Answers have one token, so computing takes as little as it can. Rows per call are the same on both sides. The time of a
row on the worker is taken between the end of the first call and that of the last, since the first waits for the cluster
and the model.

Prints a line; with --json one last line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import checkout  # noqa: F401

from offmoe.batch.lines import Line, line_of
from offmoe.ray import Generator, cluster

CALL = cluster.ROWS * cluster.WIDTH
"""Rows of one call."""
OPTIONS: dict[str, Any] = {"model": "demo", "device": "cpu", "exactness": "bitwise"}


class Times:
    """Notes when results come."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def is_done(self, line: Line) -> bool:
        """No line has an answer before."""
        return False

    def add(self, line: Line, result: Mapping[str, Any], *, failed: bool) -> None:
        """Take the result of a line."""
        assert not failed, result
        self.at.append(time.perf_counter())


def lines(count: int) -> list[Line]:
    """Short prompts, each another one."""
    return [line_of(i, {"prompt": f"Chapter {i}", "max_tokens": 1, "temperature": 0}) for i in range(1, count + 1)]


def here(asked: list[Line]) -> float:
    """Seconds per row of a generator in this process."""
    import pyarrow as pa

    rows = [{"line": line.number, "url": line.url, "body": json.dumps(line.body)} for line in asked]
    generator = Generator(**OPTIONS)
    calls = [pa.Table.from_pylist(rows[start : start + CALL]) for start in range(0, len(rows), CALL)]
    generator(calls[0])
    began = time.perf_counter()
    for call in calls[1:]:
        generator(call)
    seconds = time.perf_counter() - began
    generator.close()
    return seconds / (len(rows) - CALL)


def on_worker(asked: list[Line]) -> tuple[float, float]:
    """Seconds per row of a worker, and seconds until the first result."""
    times = Times()
    with cluster.connected(cluster.LOCAL):
        began = time.perf_counter()
        cluster.answer(asked, times, lambda _: None, cluster.workers(1, "cpu"), OPTIONS)
    return (times.at[-1] - times.at[CALL - 1]) / (len(asked) - CALL), times.at[0] - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16 * CALL)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    asked = lines(max(args.rows, 4 * CALL))
    direct = here(asked)
    worker, first = on_worker(asked)
    found = {"rows": len(asked), "row_ms": 1e3 * direct, "ray_row_ms": 1e3 * worker, "first_result_s": first}
    print(
        f"{len(asked)} rows: {found['row_ms']:.2f} ms each, on a worker of Ray {found['ray_row_ms']:.2f} ms: "
        f"{found['ray_row_ms'] - found['row_ms']:+.2f} ms per row. First results after {first:.1f} s"
    )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Runs contenders in paired rounds on the same work, and computes what the hardware would allow.

Each contender is a process that stays loaded, in a memory cgroup of its own if there is a cap. One contender works at a
time, and another one begins in every round, so that a drift of the machine affects all alike. The figures are medians
over rounds of ratios within a round. No process and no cgroup is left behind.
"""

from __future__ import annotations

import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import offmoe
from offmoe.bench.memory_cap import MemoryCap
from offmoe.bench.messages import Costs, Outcome, Pass, Task, send
from offmoe.errors import CapacityError, OffmoeError
from offmoe.text import format_size

START = "import sys; sys.path.insert(0, sys.argv[1]); from offmoe.bench.contender import main; main()"
"""Runs the contender with this very offmoe, installed or not."""


class ContenderProcess:
    """A contender's process, seen from the benchmark. cap: bytes of its memory cgroup; None for no cgroup."""

    def __init__(self, name: str, task: Task, cap: int | None = None):
        self.name, self.task, self.cap = name, task, cap
        command = [sys.executable, "-c", START, str(Path(offmoe.__file__).parents[1])]
        with ExitStack() as stack:
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self._cgroup = None if cap is None else stack.enter_context(closing(MemoryCap.create(cap, name)))
            self._process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr)
            )
            stack.push(self._end)
            if self._cgroup is not None:
                self._cgroup.add(self._process.pid)
            self._ask(task)
            self._resources = stack.pop_all()

    def run(self, work: Pass) -> Outcome:
        return cast("Outcome", self._ask(("run", work)))

    def costs(self) -> Costs:
        return cast("Costs", self._ask(("costs",)))

    def peak(self) -> dict[str, int | None]:
        """Peak memory in bytes: of the process (rss), of its cgroup including page cache, and of the device."""
        own = cast("dict[str, int | None]", self._ask(("peak",)))
        return own if self._cgroup is None else {**own, "cgroup": self._cgroup.peak_bytes}

    def close(self) -> None:
        """End the process. Idempotent."""
        self._resources.close()

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(self, *error: Any) -> None:
        self._resources.__exit__(*error)

    def _end(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process; after an error kill it, because it may be in the middle of anything."""
        assert self._process.stdin is not None
        if kind is not None:
            self._process.kill()
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()

    def _ask(self, message: object) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            send(self._process.stdin, message)
            answer = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            raise self._ended() from None
        if isinstance(answer, OffmoeError):
            raise type(answer)(f"{self.name}: {answer}")
        return answer

    def _ended(self) -> OffmoeError:
        status = self._process.wait()
        if self._cgroup is not None and self._cgroup.kills:
            assert self.cap is not None
            return CapacityError(
                f"{self.name} was ended by the kernel: it needed more than the memory cap of {format_size(self.cap)}. "
                "Lower --device-memory or raise the cap."
            )
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return OffmoeError(f"{self.name} ended with status {status}{last}")


@dataclass
class Record:
    """The results of one contender over all rounds."""

    outcomes: list[Outcome] = field(default_factory=list)
    peak: Mapping[str, int | None] = field(default_factory=dict)

    def token_s(self) -> float:
        """Median over rounds of the mean seconds per token after the first."""
        return statistics.median(mean_s(outcome) for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON, as medians over rounds.

        Bytes and stall are per decoded token; `read_bytes_per_round` counts the prompt too. Of the demands,
        `resident_rate` had a slot before anything was predicted, `foretold_rate` were prefetched or read ahead, and
        `missed_rate` were neither; the first two make `hit_rate`.
        """
        token_s = self.token_s()
        return {
            "ttft_s": statistics.median(outcome.ttft_s for outcome in self.outcomes),
            "ms_per_token": token_s * 1e3,
            "tokens_per_s": 1 / token_s,
            "hit_rate": self._counted(lambda stats, tokens: stats["hit_rate"]),
            "resident_rate": self._counted(_share_of("hits")),
            "foretold_rate": self._counted(_share_of("pending")),
            "missed_rate": self._counted(_share_of("misses")),
            "disk_bytes_per_token": self._counted(lambda stats, tokens: stats["disk_bytes"] / tokens),
            "h2d_bytes_per_token": self._counted(lambda stats, tokens: stats["h2d_bytes"] / tokens),
            "prefetched_per_token": self._counted(lambda stats, tokens: stats["prefetched"] / tokens),
            "stall_ms_per_token": self._counted(lambda stats, tokens: stats["stall_s"] * 1e3 / tokens),
            "read_bytes_per_round": self._median([outcome.read_bytes for outcome in self.outcomes]),
            "peak": dict(self.peak),
        }

    def _counted(self, figure: Callable[[Mapping[str, Any], int], float]) -> float | None:
        return self._median(
            [None if o.stats is None else figure(o.stats, max(1, len(o.token_s))) for o in self.outcomes]
        )

    @staticmethod
    def _median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None


def _share_of(kind: str) -> Callable[[Mapping[str, Any], int], float]:
    """A figure: the share of the demands that are of this kind, of `CacheStats`."""

    def share(stats: Mapping[str, Any], tokens: int) -> float:
        return float(stats[kind] / max(1, stats["hits"] + stats["pending"] + stats["misses"]))

    return share


def mean_s(outcome: Outcome) -> float:
    """Seconds per token after the first."""
    return max(1e-9, statistics.fmean(outcome.token_s))


def paired(
    contenders: Sequence[ContenderProcess],
    passes: Sequence[Pass],
    between: Callable[[], object] = lambda: None,
    progress: Callable[[int], object] = lambda rounds: None,
) -> list[Record]:
    """Let every contender do every pass.

    Args:
        contenders: the contenders. The one that begins changes with every pass.
        passes: the work. The first pass warms up and is not recorded.
        between: called before every recorded round.
        progress: called with 1 after every pass.

    Returns:
        A record for each contender.
    """
    records = [Record() for _ in contenders]
    for number, work in enumerate(passes):
        turn = number % len(contenders)
        if number:
            between()
        for i in [*range(turn, len(contenders)), *range(turn)]:
            outcome = contenders[i].run(work)
            if number:
                records[i].outcomes.append(outcome)
        progress(1)
    for record, contender in zip(records, contenders, strict=True):
        record.peak = contender.peak()
    return records


def ratio(slower: Record, faster: Record, of: Callable[[Outcome], float] = mean_s) -> dict[str, float]:
    """How many times as long `slower` took as `faster` in the same round: median, least and most over rounds."""
    pairs = zip(slower.outcomes, faster.outcomes, strict=True)
    ratios = [of(a) / max(of(b), 1e-9) for a, b in pairs]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def same(a: Record, b: Record) -> dict[str, bool]:
    """Whether both gave the same tokens, and whether their logits have the same bits."""
    pairs = list(zip(a.outcomes, b.outcomes, strict=True))
    return {
        "tokens": all(x.tokens == y.tokens for x, y in pairs),
        "logits": all(x.digest == y.digest for x, y in pairs),
    }


def roofline(record: Record, costs: Costs, disk_gb_s: float) -> dict[str, float | None]:
    """The least time that a token needs on this hardware, and how close a contender came.

    The bound is the slowest of three: reading the bytes that arrived in slots, copying them over the link, computing.
    Wasted read-aheads reached no slot, so they are no part of the bound.

    Args:
        record: of the contender.
        costs: measured in the contender.
        disk_gb_s: speed of the disk, from the probes between rounds.

    Returns:
        Speeds, milliseconds per token of each of the three and of the bound, and `share`: bound / measured time.
    """
    measured = record.to_dict()
    arrived = measured["h2d_bytes_per_token"] or 0.0
    disk_s = min(measured["disk_bytes_per_token"] or 0.0, arrived) / (disk_gb_s * 1e9)
    link_s = None if costs.link_gb_s is None else arrived / (costs.link_gb_s * 1e9)
    bound = max(disk_s, link_s or 0.0, costs.compute_s or 0.0)
    return {
        "disk_gb_s": disk_gb_s,
        "link_gb_s": costs.link_gb_s,
        "disk_ms": disk_s * 1e3,
        "link_ms": None if link_s is None else link_s * 1e3,
        "compute_ms": None if costs.compute_s is None else costs.compute_s * 1e3,
        "bound_ms": bound * 1e3,
        "share": bound / record.token_s(),
    }

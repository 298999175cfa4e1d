"""The nouns of offmoe: what one layer asks for, what is decided about it, and what is counted.

Nothing moves here and nothing decides here. Everything is plain integers and tuples, so that the runtime, the
simulator and (later) a planner on the device can share it. Must never import torch.

A *demand* is one expert needed by one step of one layer, whatever the number of tokens routed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

TAIL_TOKENS = 64
"""Rows at the end of a step that say what decoding will need next (house.md, Decisions)."""
HOST, DISK = "host", "disk"
"""Where weights rest that are not on the device."""


class ExpertKey(NamedTuple):
    """One expert: MoE layer index (dense layers do not count) and expert id within it."""

    layer: int
    expert: int


class Lookup(IntEnum):
    """Where an expert is, as the decisions see it. PENDING: prefetched and not demanded since."""

    MISS = 0
    PENDING = 1
    HIT = 2


class Demand(NamedTuple):
    """One expert of an access: its id, tokens routed to it, and how many of them are among the last 64 of the step."""

    expert: int
    tokens: int
    tail_tokens: int


class Access(NamedTuple):
    """What one layer asks for in one step.

    `demands` ascend by expert id. `tail` is the number of rows that tail_tokens are counted in: min(rows of the step,
    64). `predicted` are expert ids the next MoE layer will probably want, most wanted first; () when nothing is
    predicted."""

    layer: int
    demands: tuple[Demand, ...]
    tail: int
    predicted: tuple[int, ...] = ()


class Fetch(NamedTuple):
    """One movement of one expert into a device slot, forgetting what the slot held (`evicted`, None if it was free).

    It comes from RAM slot `host`; `read`: after having been read there from disk. No host: it is read past RAM.
    `read_ahead`: reading it began when the layer before ran (`Plan.read_ahead`), and was counted then."""

    key: ExpertKey
    slot: int
    evicted: ExpertKey | None
    host: int | None = None
    read: bool = True
    read_ahead: bool = False


class Wave(NamedTuple):
    """Experts of one layer that are resident together, and the fetches that come first.

    `experts` are (expert id, slot) pairs in the order to compute them: residents, those still on their way, fetches.
    """

    experts: tuple[tuple[int, int], ...]
    fetches: tuple[Fetch, ...]


class Plan(NamedTuple):
    """What to do for one access. Waves run in order; prefetches (of the next layer) start after the last one.

    `read_ahead` are experts of the next layer that are on disk and predicted. Reading them begins behind the fetches of
    this plan; they get no slot before they are demanded, and what the next plan does not fetch is not read further.
    `hits`, `pending` and `misses` count demands; `host_computed` of the misses get no slot. On a device whose memory is
    the host's they pass through scratch slots in `waves`, like the others. Beside a device with memory of its own, the
    host computes the waves `on_host` from scratch slots in RAM; they are fetched first, and computed while the device
    computes the first of `waves`, which then waits for no fetch of this plan."""

    layer: int
    waves: tuple[Wave, ...]
    prefetches: tuple[Fetch, ...]
    hits: int
    pending: int
    misses: int
    host_computed: int = 0
    on_host: tuple[Wave, ...] = ()
    read_ahead: tuple[ExpertKey, ...] = ()


@dataclass(frozen=True)
class CacheShape:
    """The part of a model that decisions depend on; one entry per MoE layer.

    experts: ids run over range(experts[layer]). top_k: demands of a single token. expert_bytes: one expert at rest.
    """

    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    expert_bytes: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.experts)

    @cached_property
    def first_key(self) -> tuple[int, ...]:
        """Key of expert 0 of each MoE layer. An expert's key is first_key[layer] + expert, whatever the scope."""
        return (0, *accumulate(self.experts[:-1]))

    @property
    def num_keys(self) -> int:
        """Experts of the whole model."""
        return sum(self.experts)


@dataclass
class CacheStats:
    """Counts of what a cache did, folded from plans; the same class for one layer and for a whole model.

    hits + pending + misses == demands; pending ones were prefetched, into a slot or read ahead without one. Bytes are
    those of fetches and prefetches; what is read ahead counts as a whole, however soon it was stopped. `h2d_bytes`
    arrived in device slots (on a CPU the slots are RAM), `disk_bytes` were read from disk, the rest came from the host
    tier. What the host computes beside a device never arrives there, but may have been read. `stall_s` is time and no
    part of `==`: seconds that computing waited for an expert. Snapshots subtract."""

    hits: int = 0
    pending: int = 0
    misses: int = 0
    host_computed: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    evictions: int = 0
    h2d_bytes: int = 0
    disk_bytes: int = 0
    stall_s: float = field(default=0.0, compare=False)
    by_layer: list[CacheStats] = field(default_factory=list)

    @property
    def demands(self) -> int:
        return self.hits + self.pending + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of demands that needed no fetch of their own; 0.0 before the first demand."""
        return (self.hits + self.pending) / self.demands if self.demands else 0.0

    @classmethod
    def for_layers(cls, layers: int) -> CacheStats:
        return cls(by_layer=[cls() for _ in range(layers)])

    def add(self, plan: Plan, shape: CacheShape) -> None:
        """Fold one plan into the totals and its layers (a prefetch counts for the layer it fetches)."""
        layer = plan.layer
        fetched = read = evicted = 0
        for wave in plan.waves:
            if wave.fetches:
                fetched += len(wave.fetches)
                read += sum([fetch.read and not fetch.read_ahead for fetch in wave.fetches])
                evicted += sum([fetch.evicted is not None for fetch in wave.fetches])
        for wave in plan.on_host:
            read += sum([fetch.read and not fetch.read_ahead for fetch in wave.fetches])
        nbytes = shape.expert_bytes[layer]
        for stats in (self, self.by_layer[layer]):
            stats.hits += plan.hits
            stats.pending += plan.pending
            stats.misses += plan.misses
            stats.host_computed += plan.host_computed
            stats.prefetched_used += plan.pending
            stats.evictions += evicted
            stats.h2d_bytes += fetched * nbytes
            stats.disk_bytes += read * nbytes
        for fetch in plan.prefetches:
            target = fetch.key.layer
            for stats in (self, self.by_layer[target]):
                stats.prefetched += 1
                stats.evictions += fetch.evicted is not None
                stats.h2d_bytes += shape.expert_bytes[target]
                stats.disk_bytes += shape.expert_bytes[target] * fetch.read
        for key in plan.read_ahead:
            for stats in (self, self.by_layer[key.layer]):
                stats.prefetched += 1
                stats.disk_bytes += shape.expert_bytes[key.layer]

    def stalled(self, layer: int, seconds: float) -> None:
        self.stall_s += seconds
        self.by_layer[layer].stall_s += seconds

    def __add__(self, other: CacheStats) -> CacheStats:
        numbers = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "by_layer"}
        pairs = zip(self.by_layer, other.by_layer, strict=True)
        return CacheStats(**numbers, by_layer=[a + b for a, b in pairs])

    def __sub__(self, earlier: CacheStats) -> CacheStats:
        numbers = {
            f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self) if f.name != "by_layer"
        }
        pairs = zip(self.by_layer, earlier.by_layer, strict=True)
        return CacheStats(**numbers, by_layer=[a - b for a, b in pairs])

    def copy(self) -> CacheStats:
        return self - CacheStats.for_layers(len(self.by_layer))

    def to_dict(self) -> dict[str, object]:
        """Totals flat with `hit_rate`, and `by_layer`, a list of the same: the form of every `--json` output."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "by_layer"}
        out: dict[str, object] = {**numbers, "hit_rate": self.hit_rate}
        if self.by_layer:
            out["by_layer"] = [layer.to_dict() for layer in self.by_layer]
        return out


def count_demands(experts: np.ndarray, num_experts: int) -> tuple[tuple[Demand, ...], int]:
    """Demands of one step of one layer, and the rows in its tail.

    experts: int [tokens, top_k] in router order; ids outside range(num_experts) are nobody's (dropped, padding).
    The trace, the simulator and the runtime all count here, or replay would not be exact.
    """
    rows = experts.shape[0]
    tail = min(rows, TAIL_TOKENS)
    if rows == 1:
        return single_demands(experts[0].tolist(), num_experts), 1
    if experts.size <= 64:  # beams and small batches: numpy's calls would cost more than the counting
        few: dict[int, int] = {}
        for e in chain.from_iterable(experts.tolist()):
            if 0 <= e < num_experts:
                few[e] = few.get(e, 0) + 1
        return tuple([Demand(e, n, n) for e, n in sorted(few.items())]), tail
    tokens = _tokens_per_expert(experts, num_experts)
    tail_tokens = _tokens_per_expert(experts[-tail:], num_experts)
    ids = np.flatnonzero(tokens).tolist()
    return tuple([Demand(e, int(tokens[e]), int(tail_tokens[e])) for e in ids]), tail


def single_demands(experts: Sequence[int], num_experts: int) -> tuple[Demand, ...]:
    """Demands of one token."""
    return tuple([Demand(e, 1, 1) for e in sorted({e for e in experts if 0 <= e < num_experts})])


def _tokens_per_expert(experts: np.ndarray, num_experts: int) -> np.ndarray:
    flat = experts.ravel()
    return np.bincount(flat[(flat >= 0) & (flat < num_experts)], minlength=num_experts)


def rank_predictions(predicted: np.ndarray, num_experts: int) -> tuple[int, ...]:
    """Predicted experts of one step of one layer, most wanted first.

    predicted: int [tokens, p] in router order. More tokens first, then the better best rank, then the lower id.
    """
    if len(predicted) == 1:
        return tuple(dict.fromkeys([e for e in predicted[0].tolist() if 0 <= e < num_experts]))
    tokens = _tokens_per_expert(predicted, num_experts)
    rank = np.full(num_experts, predicted.shape[1])
    for i in range(predicted.shape[1] - 1, -1, -1):
        column = predicted[:, i]
        rank[column[(column >= 0) & (column < num_experts)]] = i
    experts = np.flatnonzero(tokens)
    return tuple(experts[np.lexsort((experts, rank[experts], -tokens[experts]))].tolist())

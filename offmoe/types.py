"""The nouns of offmoe: what a layer asks for (`Access`), what is decided (`Plan`), and what is counted (`CacheStats`).

A *step* is one forward pass. A *demand* is one expert that one layer needs in one step, however many tokens are routed
to it. Everything here is integers and tuples, which the runtime and the simulator share.
"""

from __future__ import annotations

import copy
import operator
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np

TAIL_TOKENS = 64
"""Rows at the end of a step whose routing is counted apart: decoding goes on from these."""
HOST, DISK = "host", "disk"
"""Where weights are stored that are not on the device."""


class ExpertKey(NamedTuple):
    """One expert: the index of its MoE layer (dense layers do not count) and its id within the layer."""

    layer: int
    expert: int


class Demand(NamedTuple):
    """One expert of an access: its id, the tokens routed to it, and those of them in the tail of the step."""

    expert: int
    tokens: int
    tail_tokens: int


class Access(NamedTuple):
    """What one layer asks for in one step.

    layer: index of the MoE layer.
    demands: ascending by expert id.
    tail: rows in which `tail_tokens` are counted, min(rows of the step, TAIL_TOKENS).
    predicted: expert ids that the next MoE layer will probably demand, the likeliest first; () without a prediction.
    """

    layer: int
    demands: tuple[Demand, ...]
    tail: int
    predicted: tuple[int, ...] = ()


class Fetch(NamedTuple):
    """One movement of one expert into a slot of the device.

    slot: the slot; beyond the pool's slots, a scratch slot.
    evicted: the expert that the slot held before; None if it was free.
    host: the RAM slot that the expert passes through; None if it is read past RAM.
    read: whether it must be read from disk, into RAM slot `host` if there is one.
    read_ahead: the plan before began to read it (`Plan.read_ahead`) and counted the read.
    """

    key: ExpertKey
    slot: int
    evicted: ExpertKey | None
    host: int | None = None
    read: bool = True
    read_ahead: bool = False


class Fill(NamedTuple):
    """An expert that is read in the background, and the free places that it goes to.

    slot: the slot of the device; None: none.
    host: the RAM slot; None: none. At least one of the two is set.
    """

    key: ExpertKey
    slot: int | None
    host: int | None


class Wave(NamedTuple):
    """Experts of one layer that have slots at the same time.

    experts: (expert id, slot) pairs in the order of computing: residents, then pending ones, then fetches.
    fetches: the movements that the wave waits for.
    """

    experts: tuple[tuple[int, int], ...]
    fetches: tuple[Fetch, ...]


class Plan(NamedTuple):
    """What to do for one access.

    waves: run in order.
    prefetches: copies into slots that start behind the last wave; for the next layer, or of an expert that the host
        has just computed.
    hits, pending, misses: demands that had a slot, that were prefetched or read ahead, and that were neither.
    host_computed: misses that get no slot. They pass through scratch slots: in `waves` on a device whose memory is the
        host's, else in `on_host`.
    on_host: waves that the host computes from scratch slots in RAM. They are fetched first and computed while the
        device computes the first of `waves`, which then waits for no fetch.
    read_ahead: experts of the next layer that are on disk and predicted. Reading them into staging begins behind the
        fetches of this plan. They get no slot before they are demanded, and the read of one that the next plan does
        not fetch is stopped.
    """

    layer: int
    waves: tuple[Wave, ...]
    prefetches: tuple[Fetch, ...]
    hits: int
    pending: int
    misses: int
    host_computed: int = 0
    on_host: tuple[Wave, ...] = ()
    read_ahead: tuple[ExpertKey, ...] = ()


class KeptSlots(NamedTuple):
    """By new slot, the old slot whose expert it is to hold.

    on_device: slots of the device. in_ram: slots of the host tier.
    """

    on_device: dict[int, int]
    in_ram: dict[int, int]


@dataclass(frozen=True)
class CacheShape:
    """The part of a model that decisions depend on, with one entry per MoE layer.

    experts: number of experts. top_k: experts that one token is routed to. expert_bytes: size of one expert as stored.
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

    @cached_property
    def _experts(self) -> dict[int, ExpertKey]:
        return {}

    def expert(self, key: int) -> ExpertKey:
        """The expert of a key; kept, because creating one takes longer than finding it."""
        expert = self._experts.get(key)
        if expert is None:
            layer = bisect_right(self.first_key, key) - 1
            expert = self._experts[key] = ExpertKey(layer, key - self.first_key[layer])
        return expert

    @property
    def num_keys(self) -> int:
        """Experts of the whole model."""
        return sum(self.experts)

    def spread(self, slots: int) -> tuple[int, ...]:
        """`slots` slots in equal quotas, none above the layer's experts; the remainder goes to the first layers."""
        quotas = [0] * self.layers
        while slots and (growing := [i for i, n in enumerate(self.experts) if quotas[i] < n]):
            each = max(1, min(slots // len(growing), *(self.experts[i] - quotas[i] for i in growing)))
            for i in growing[: slots // each]:
                quotas[i] += each
                slots -= each
        return tuple(quotas)


@dataclass
class CacheStats:
    """Counts of what a cache did: a sum over plans. The same class serves one layer and a whole model.

    hits, pending, misses: demands, as in `Plan`.
    host_computed: misses that got no slot.
    prefetched: experts that were prefetched into a slot or read ahead. prefetched_used: those demanded afterwards.
    evictions: experts that lost their slot.
    h2d_bytes: moved into device slots (on a CPU these are RAM); experts that the host computes do not count.
    disk_bytes: read from disk; a read ahead counts as a whole, however soon it was stopped.
    filled: slots and RAM slots that the background fill gave to an expert. Their bytes are in no other count.
    stall_s: seconds that computing waited for experts. Not compared by `==`.
    by_layer: the same counts for each MoE layer.

    Snapshots can be subtracted.
    """

    hits: int = 0
    pending: int = 0
    misses: int = 0
    host_computed: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    evictions: int = 0
    h2d_bytes: int = 0
    disk_bytes: int = 0
    filled: int = 0
    stall_s: float = field(default=0.0, compare=False)
    by_layer: list[CacheStats] = field(default_factory=list)

    @property
    def demands(self) -> int:
        return self.hits + self.pending + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of demands that were hits or pending; 0.0 before the first demand."""
        return (self.hits + self.pending) / self.demands if self.demands else 0.0

    @classmethod
    def for_layers(cls, layers: int) -> CacheStats:
        return cls(by_layer=[cls() for _ in range(layers)])

    def add(self, plan: Plan, shape: CacheShape) -> None:
        """Add one plan to the totals and to its layer. A prefetch counts for the layer of its expert."""
        layer = plan.layer
        self.hits += plan.hits
        self.by_layer[layer].hits += plan.hits
        if plan.misses or plan.pending:  # else nothing moves, as in most layers of most steps
            fetches = [fetch for wave in plan.waves for fetch in wave.fetches]
            on_host = [fetch for wave in plan.on_host for fetch in wave.fetches]
            fetched, evicted = len(fetches), sum([fetch.evicted is not None for fetch in fetches])
            read = sum([fetch.read and not fetch.read_ahead for fetch in fetches + on_host])
            nbytes = shape.expert_bytes[layer]
            for stats in (self, self.by_layer[layer]):
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
        """Count `seconds` that the computing of `layer` waited."""
        self.stall_s += seconds
        self.by_layer[layer].stall_s += seconds

    def filled_by(self, expert: ExpertKey, count: int = 1) -> None:
        """Add `count` slots that the background fill gave to an expert."""
        self.filled += count
        self.by_layer[expert.layer].filled += count

    def __add__(self, other: CacheStats) -> CacheStats:
        return self._combined(other, operator.add)

    def __sub__(self, earlier: CacheStats) -> CacheStats:
        return self._combined(earlier, operator.sub)

    def _combined(self, other: CacheStats, operation: Callable[[Any, Any], Any]) -> CacheStats:
        numbers = {name: operation(value, getattr(other, name)) for name, value in self._numbers().items()}
        pairs = zip(self.by_layer, other.by_layer, strict=True)
        return CacheStats(**numbers, by_layer=[layer._combined(same, operation) for layer, same in pairs])

    def _numbers(self) -> dict[str, Any]:
        """The totals by name."""
        return {name: value for name, value in vars(self).items() if name != "by_layer"}

    def copy(self) -> CacheStats:
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, object]:
        """Totals with `hit_rate`, and `by_layer`, a list of the same. Every `--json` output has this form."""
        out: dict[str, object] = {**self._numbers(), "hit_rate": self.hit_rate}
        if self.by_layer:
            out["by_layer"] = [layer.to_dict() for layer in self.by_layer]
        return out


def count_demands(experts: np.ndarray, num_experts: int) -> tuple[tuple[Demand, ...], int]:
    """Demands of one step of one layer, and the rows in its tail.

    Runtime and replay both count with this function, which keeps replay exact.

    Args:
        experts: int [tokens, top_k], in router order. Ids outside range(num_experts) are padding and do not count.

    Returns:
        (demands ascending by expert id, min(tokens, TAIL_TOKENS)).
    """
    tail = min(rows := experts.shape[0], TAIL_TOKENS)
    if rows == 1:
        return single_demands(experts[0].tolist(), num_experts), 1
    if experts.size <= 64:  # a small batch: numpy's calls would cost more than counting
        few: dict[int, int] = {}
        for e in chain.from_iterable(experts.tolist()):
            if 0 <= e < num_experts:
                few[e] = few.get(e, 0) + 1
        return tuple([Demand(e, n, n) for e, n in sorted(few.items())]), tail
    tokens = _tokens_per_expert(experts, num_experts)  # [num_experts]
    tail_tokens = _tokens_per_expert(experts[-tail:], num_experts)  # [num_experts]
    ids = np.flatnonzero(tokens).tolist()
    return tuple([Demand(e, int(tokens[e]), int(tail_tokens[e])) for e in ids]), tail


def single_demands(experts: Sequence[int], num_experts: int) -> tuple[Demand, ...]:
    """Demands of one token."""
    return tuple([_single_demand(e) for e in sorted({e for e in experts if 0 <= e < num_experts})])


@cache
def _single_demand(expert: int) -> Demand:
    """Kept, because creating one takes longer than finding it."""
    return Demand(expert, 1, 1)


def _tokens_per_expert(experts: np.ndarray, num_experts: int) -> np.ndarray:
    flat = experts.ravel()
    return np.bincount(flat[(flat >= 0) & (flat < num_experts)], minlength=num_experts)


def rank_predictions(predicted: np.ndarray, num_experts: int) -> tuple[int, ...]:
    """Predicted experts of one step of one layer, the likeliest first.

    Experts predicted for more tokens come first, then those with the better best rank, then those with the lower id.

    Args:
        predicted: int [tokens, p], in router order.
    """
    if len(predicted) == 1:
        return tuple(dict.fromkeys([e for e in predicted[0].tolist() if 0 <= e < num_experts]))
    tokens = _tokens_per_expert(predicted, num_experts)  # [num_experts]
    rank = np.full(num_experts, predicted.shape[1])  # [num_experts], each expert's best rank
    for i in range(predicted.shape[1] - 1, -1, -1):
        column = predicted[:, i]  # [tokens]
        rank[column[(column >= 0) & (column < num_experts)]] = i
    experts = np.flatnonzero(tokens)
    return tuple(experts[np.lexsort((experts, rank[experts], -tokens[experts]))].tolist())

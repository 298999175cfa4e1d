"""Victims that are named one access before they are taken, so that a device need not ask the host in between (lag 1).

After each access of a layer the host leaves an ordered list of slots: those that are free, then those of the policy's
next victims. The misses of the layer's next access take them in ascending expert id and pass over experts that this
access demands. A named victim stays a hit until its slot is taken, so naming it costs no capacity.

The list is a function of the state that the access finds. Nothing changes it in between, so planner and simulator name
victims only when an access misses. After a background fill or a resize, which the host does between two accesses, it
leaves the list anew.

Where the rule does not hold, victims are chosen when they are needed (lag 0): in a pool of all layers, in a layer with
fewer than 2 top_k slots, in steps of more than 8 rows, and where the list has too few victims for the misses.

An access changes the scores of the keys that it demands, and none of those can be its victim. So every `ScoredPolicy`
evicts the same keys at either lag; queues (sieve, s3-fifo) may differ.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from offmoe.config import CacheOptions
from offmoe.policy.residency import Residency
from offmoe.types import Access, CacheShape

MOST_ROWS = 8
"""Most tokens of a step whose misses take named victims."""
NAMED = 2
"""Slots that are named, in multiples of top_k; a layer with fewer has none named. Of top_k experts that one token
demands, m miss and top_k - m are hits, so at least top_k + m named slots are left for the m."""


class Place(NamedTuple):
    """A slot that the next access may take, and the key that it holds; None if it is free."""

    slot: int
    key: int | None


class NamedVictims:
    """The rule for all layers of one model. It decides from the state of residency and policy alone."""

    def __init__(self, options: CacheOptions, shape: CacheShape) -> None:
        quotas = options.quotas(shape) if options.lag == 1 and options.scope == "layer" else (0,) * shape.layers
        self._counts = [NAMED * k if n >= NAMED * k else 0 for n, k in zip(quotas, shape.top_k, strict=True)]
        self._known: dict[int, tuple[int, list[int | None]]] = {}
        """By layer whose list was asked for since its last access: the residency's `changes` then, and its holders."""

    @property
    def holds_everywhere(self) -> bool:
        """Whether victims are named in every layer."""
        return all(self._counts)

    @property
    def keeps_lists(self) -> bool:
        """Whether a list of `places` is kept for a layer's next access."""
        return bool(self._known)

    def places(self, layer: int, residency: Residency) -> tuple[Place, ...]:
        """The places that the layer's next access may take, in order; () where the rule does not hold.

        Args:
            residency: of the layer, before the policy sees that access.
        """
        slot_of, free = residency.slot_of, residency.free_slots
        holders = enumerate(self._holders(layer, residency))  # free slots come first
        return tuple([Place(free[-1 - i] if key is None else slot_of[key], key) for i, key in holders])

    def _holders(self, layer: int, residency: Residency) -> list[int | None]:
        """The key that holds each of `places`, or None."""
        count = self._counts[layer]
        if not count:
            return []
        changes, holders = self._known.get(layer, (-1, []))
        if changes != residency.changes:
            free = min(count, residency.num_free)
            holders = [*[None] * free, *residency.rank_victims(count - free)]
            self._known[layer] = residency.changes, holders
        return holders

    def take(
        self, residency: Residency, access: Access, missing: Sequence[int], keys: Collection[int]
    ) -> Sequence[int | None]:
        """The victims of the missing keys of an access; nothing is evicted yet.

        To be called for every access that has some, and while lists are kept for every access.

        Args:
            residency: of the layer, before the policy sees the access.
            missing: keys that have no slot, ascending.
            keys: all keys of the access.

        Returns:
            Per missing key the key that it evicts, None for a free slot; () where the rule does not hold.
        """
        victims: list[int | None] = []
        if missing and access.tail <= MOST_ROWS:
            victims = [key for key in self._holders(access.layer, residency) if key not in keys]
        self._known.pop(access.layer, None)  # the policy sees the access next
        return victims[: len(missing)] if len(victims) >= len(missing) else ()

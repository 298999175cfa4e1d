"""Which experts of a layer the C kernels can compute now, for calls that do more than compute experts.

Moves: nothing. Bound: one look-up per expert that was given or lost a slot since the last look.
Must never: name an expert whose bytes are still on their way, or one that another expert has replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from offmoe.compute.compute import ExpertCompute
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.token_layers import ExpertTable
from offmoe.policy.layer_cache import LayerCache
from offmoe.policy.residency import Residency
from offmoe.transfer.engine import TransferEngine


@dataclass
class _Known:
    """A layer's table, and what it was made from.

    changes: of the residency, of which the table shows at least these. coming: experts whose bytes were on their way.
    """

    table: ExpertTable
    residency: Residency
    changes: int
    coming: set[int]


class ResidentExperts:
    """The tables of one model, for the thread that runs it."""

    def __init__(self, transfer: TransferEngine, compute: ExpertCompute) -> None:
        self._transfer, self._compute = transfer, compute
        self._known: dict[int, _Known] = {}

    def table(self, layer: ExpertLayer, cache: LayerCache) -> ExpertTable | None:
        """The experts of a layer, the same object every time until slots move; None if none of them can be computed.

        Args:
            layer: the layer.
            cache: its residents. They may change no more until the table was used.
        """
        residency, known = cache.residency, self._known.get(layer.index)
        if known is None or known.residency is not residency:
            known = _Known(ExpertTable(len(cache.keys)), residency, residency.changes, set())
            self._look(known, layer, cache, range(len(cache.keys)))
            self._known[layer.index] = known  # last: an interrupt may come at any time, and looks can be repeated
        elif known.changes != residency.changes:
            changed, first = residency.changed_since(known.changes), cache.keys.start
            experts = range(len(cache.keys)) if changed is None else {k - first for k in changed if k in cache.keys}
            self._look(known, layer, cache, known.coming.union(experts))
            known.changes = residency.changes
        elif known.coming:
            self._look(known, layer, cache, tuple(known.coming))
        return None if known.table.is_empty else known.table

    def _look(self, known: _Known, layer: ExpertLayer, cache: LayerCache, experts: Iterable[int]) -> None:
        """Let the table show where these experts are now."""
        slot_of, first, transfer = known.residency.slot_of, cache.keys.start, self._transfer
        for expert in experts:
            slot = slot_of.get(first + expert)
            if slot is not None and not transfer.is_resident((slot,)):
                known.coming.add(expert)
                known.table.put(expert, None)
            else:
                known.table.put(expert, None if slot is None else self._compute.prepared(layer, slot))
                known.coming.discard(expert)

    def slots_moved(self) -> None:
        """Hold no reference to where slots were."""
        self._known.clear()

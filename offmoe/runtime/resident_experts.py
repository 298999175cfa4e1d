"""Which experts of a layer the C kernels can compute now, for calls that do more than compute experts.

Moves: nothing. Bound: one look-up per expert of a layer whose residents have changed.
Must never: name an expert whose bytes are still on their way, or one that another expert has replaced.
"""

from __future__ import annotations

from typing import NamedTuple

from offmoe.compute.compute import ExpertCompute
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.token_layers import ExpertTable
from offmoe.policy.layer_cache import LayerCache
from offmoe.policy.residency import Residency
from offmoe.transfer.engine import TransferEngine


class _Held(NamedTuple):
    """A table, and what it was made from. changes: None if an expert was on its way then."""

    table: ExpertTable | None
    residency: Residency
    changes: int | None


class ResidentExperts:
    """The tables of one model, for the thread that runs it."""

    def __init__(self, transfer: TransferEngine, compute: ExpertCompute) -> None:
        self._transfer, self._compute = transfer, compute
        self._held: dict[int, _Held] = {}

    def table(self, layer: ExpertLayer, cache: LayerCache) -> ExpertTable | None:
        """The experts of a layer; None if the kernels compute none of them.

        Args:
            layer: the layer.
            cache: its residents. They may change no more until the table was used.
        """
        residency, held = cache.residency, self._held.get(layer.index)
        if held is not None and held.residency is residency and held.changes == residency.changes:
            return held.table
        slots = [residency.slot_of.get(key) for key in cache.keys]
        landed = [slot if slot is not None and self._transfer.is_resident([slot]) else None for slot in slots]
        experts = [None if slot is None else self._compute.prepared(layer, slot) for slot in landed]
        table = ExpertTable(experts) if any(expert is not None for expert in experts) else None
        self._held[layer.index] = _Held(table, residency, residency.changes if landed == slots else None)
        return table

    def slots_moved(self) -> None:
        """Hold no reference to where slots were."""
        self._held.clear()

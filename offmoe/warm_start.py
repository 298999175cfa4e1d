"""Warm start of one loaded model: reads the state of earlier runs, orders the background fill by it, and writes it.

A state that cannot be used is said in one line of the log, and the model is loaded without it.
"""

from __future__ import annotations

import logging
import os
from functools import cached_property

from offmoe.config import OffloadConfig
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.policy.fill import fill_order
from offmoe.policy.layer_cache import residents
from offmoe.runtime.executor import ExpertExecutor
from offmoe.state import CacheState, UnusableState, next_state, read_state, write_state
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.fingerprint import fingerprint
from offmoe.types import ExpertKey

logger = logging.getLogger(__name__)


class WarmStart:
    """What one model brings from earlier runs, and takes to later ones."""

    def __init__(self, name: str, checkpoint: Checkpoint, catalog: ExpertCatalog, config: OffloadConfig) -> None:
        """Read the state that the options name.

        Args:
            name: The model's name.
            checkpoint: The model's files, all on this machine.
            catalog: Its experts.
            config: The options.
        """
        self._name, self._checkpoint, self._catalog = name, checkpoint, catalog
        self.state = None if config.state is None else self._read(config.state)
        """The state of earlier runs; None without one that can be used."""
        self.config = config if self.state is None else config.resolved(warm_counts=self.state.shares)
        """The options, with the state's counts."""

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._checkpoint, self._checkpoint.tensors.keys() - self._catalog.keys)

    def _read(self, path: str | os.PathLike[str]) -> CacheState | None:
        try:
            state = read_state(path, self._fingerprint, self._catalog.shape.experts)
        except FileNotFoundError:
            logger.info("no state of an earlier run at %s", path)
            return None
        except UnusableState as error:
            logger.warning("%s The model is loaded without it.", error)
            return None
        return state if state.tokens else None

    def order(self) -> list[ExpertKey]:
        """All experts in the order in which the background fill brings them.

        They come by the state's counts, else by `popularity`, else as they stand in the files.
        """
        shape, counts = self._catalog.shape, self.config.popularity
        residents: frozenset[ExpertKey] = frozenset()
        if self.state is not None:
            counts, residents = self.state.counts, self.state.resident_keys()
        elif counts is not None and tuple(map(len, counts)) != shape.experts:
            counts = None  # of another model, and of no use without eviction="static", which refuses it
        positions = {
            key: min((segment.shard, segment.offset) for segment in record.segments)
            for key, record in self._catalog.records.items()
        }
        return fill_order(shape, positions, counts, residents)

    def save(self, path: str | os.PathLike[str], executor: ExpertExecutor) -> None:
        """Write the state that a later run can begin with.

        Raises:
            OffmoeError: The file cannot be written.
        """
        counts = executor.routed
        tokens = max(
            (-(-sum(layer) // top_k) for layer, top_k in zip(counts, self._catalog.shape.top_k, strict=True)), default=0
        )
        slots, in_ram = residents(executor.planner.layers)
        state = next_state(
            self.state,
            model=self._name,
            fingerprint=self._fingerprint,
            tokens=tokens,
            counts=counts,
            slots=slots,
            in_ram=in_ram,
        )
        write_state(path, state)

"""Carry out one plan for one layer: the only place where decisions, movement and computing meet.

What moves: router ids to the host (the one synchronization a layer pays), the plan's fetches into slots, tokens through
experts. Bound: per layer, the larger of reading what missed and computing what hit. Must never decide (the planner
does) and never wait (transfer does).

If anything fails half-way, residency no longer says what slots hold. Then everything is forgotten: the next step
starts from an empty cache and is right again."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from offmoe.compute.compute import ExpertCompute, Work
from offmoe.compute.kernels import ExpertMath
from offmoe.compute.kernels.autocast import autocast_enabled, concatenate
from offmoe.device.backend import Backend
from offmoe.errors import OffmoeError, TraceError
from offmoe.policy.planner import Planner, build_planner
from offmoe.runtime.host_experts import HostPart
from offmoe.trace.recorder import TraceWriter
from offmoe.transfer.engine import TransferEngine
from offmoe.types import Access, CacheStats, Demand, Plan, count_demands, rank_predictions

logger = logging.getLogger(__name__)


class Predictor(Protocol):
    """What may know the experts of a layer before its router ran."""

    def predict(self, layer: int) -> torch.Tensor | None:
        """Expert ids int64 [tokens, p] that `layer` will probably want in this step; None if unknown."""


class OneUser:
    """Context that lets one thread of one process in, again and again if it likes; OffmoeError for everybody else."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    def __enter__(self) -> None:
        if os.getpid() != self._process:  # the readers were not forked along: a fetch would wait for ever
            raise OffmoeError(
                f"the model was loaded by process {self._process} and cannot run in a fork of it. Load it in the "
                "process that uses it, or start that one with 'spawn'."
            )
        if not self._lock.acquire(blocking=False):
            raise OffmoeError(
                "the model is already generating in another thread. Wait for it, or load a second model: "
                "one cache serves one user."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._lock.release()


class ExpertExecutor:
    """Runs the experts of all layers of one model; one thread at a time."""

    def __init__(
        self,
        planner: Planner,
        transfer: TransferEngine,
        compute: ExpertCompute,
        backend: Backend,
        stats: CacheStats,
        host: HostPart | None = None,
    ):
        """host: where plans may leave experts to it."""
        self._host = host
        self._planner, self._transfer, self._compute, self._backend = planner, transfer, compute, backend
        self.shape = planner.shape
        self.stats = stats
        self.user = OneUser()
        self.predictor: Predictor | None = None
        self.trace: TraceWriter | None = None
        self._sound = True
        """Whether slots hold what residency says; false while a layer runs, and after a failure cut short."""

    def run(
        self, layer: int, math: ExpertMath, hidden: torch.Tensor, top_k_index: torch.Tensor, by_choice: bool = False
    ) -> torch.Tensor:
        """Experts of one layer: hidden [T, H], top_k_index [T, k] -> rows [T * k, H] in router order, unweighted.

        hidden may be [T * k, H], an input for each (token, expert) pair. A row whose id is no expert's is zero.
        by_choice: an expert sees the tokens that chose it first before those that chose it second, not token by token.
        """
        with self.user:  # parts of a model can be called without the whole, past the lock around its forward
            if not self._sound:
                self.forget()
            self._sound = False
            try:
                rows = self._run(layer, math, hidden, top_k_index, by_choice)
            except BaseException:
                self.forget()
                raise
            self._sound = True
            return rows

    def _run(
        self, layer: int, math: ExpertMath, hidden: torch.Tensor, top_k_index: torch.Tensor, by_choice: bool
    ) -> torch.Tensor:
        ids, predicted = self._routing(layer, top_k_index)
        if self.trace is not None:
            self.trace.record(layer, ids, predicted)
        demands, tail = count_demands(ids, self.shape.experts[layer])
        if not demands:
            return hidden.new_zeros(top_k_index.numel(), hidden.shape[-1])
        ahead = () if predicted is None else rank_predictions(predicted, self.shape.experts[layer + 1])
        access = Access(layer, demands, tail, ahead)
        plan = self._planner.plan(access)
        self.stats.add(plan, self.shape)
        groups = None if len(hidden) == 1 else _groups(top_k_index, demands, by_choice)
        work = Work(hidden, groups, top_k_index.numel() // len(hidden))
        return self._execute(plan, math, work, ids)

    def forget(self) -> None:
        """Start again from an empty cache; a recording ends here, since replay could not follow."""
        self._planner = build_planner(self._planner.options, self.shape)
        self._transfer.forget()
        self._sound = True
        if self.trace is not None:
            logger.warning("recording of the routing ends here: %s", self.trace.path)
            try:
                self.end_trace()
            except TraceError as error:  # what made us forget is the error to show
                logger.error("%s", error)

    def end_trace(self) -> None:
        """Write the recording, if there is one."""
        trace, self.trace = self.trace, None
        if trace is not None:
            trace.close()

    def _routing(self, layer: int, top_k_index: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids [T, k] on the host, and those predicted for the next layer if a plan could use them."""
        if self.predictor is not None and self._planner.wants_prediction(layer + 1):
            predicted = self.predictor.predict(layer + 1)
            if predicted is not None:
                ids, ahead = self._backend.to_host([top_k_index, predicted])
                return ids, ahead
        return self._backend.to_host([top_k_index])[0], None

    def _execute(self, plan: Plan, math: ExpertMath, work: Work, ids: np.ndarray) -> torch.Tensor:
        """Rows of every (token, expert) pair."""
        transfer, hidden, pairs = self._transfer, work.hidden, work.pairs
        outputs: dict[int, torch.Tensor] = {}
        rows: torch.Tensor | None = None

        def place(expert: int, out: torch.Tensor) -> None:
            nonlocal rows
            if pairs is None:
                outputs[expert] = out
                return
            if rows is None:
                rows = out.new_zeros(ids.size, hidden.shape[-1])
            rows[pairs[expert]] = out.to(rows.dtype)

        given = None
        if plan.on_host:
            assert self._host is not None
            given = self._host.given(plan.on_host, work)
            # What the first wave waits for comes first: readers may soon stand waiting for the host to free scratch.
            transfer.demand([slot for _, slot in plan.waves[0].experts])
            transfer.stream(plan.on_host)
        transfer.stream(plan.waves)
        transfer.read_ahead(plan.read_ahead)
        streaming = len(plan.waves) > 1
        for wave in plan.waves:
            made = self._compute.wave(plan.layer, math, wave.experts, work, transfer)
            for (expert, slot), out in zip(wave.experts, made, strict=True):
                place(expert, out)
                if streaming:
                    transfer.computed((slot,))  # at once: an expert of a later wave may be waiting for this slot
            if not streaming:
                transfer.computed([slot for _, slot in wave.experts])
            if given is not None and self._host is not None:  # while the device computes its first wave
                for expert, out in self._host.run(plan.layer, math, plan.on_host, given, transfer, work):
                    place(expert, out)
                given = None
        if plan.prefetches:
            transfer.prefetch(plan.prefetches)
        if rows is not None:
            return rows
        order = ids[0].tolist()
        if len(outputs) < len(order):
            nothing = torch.zeros_like(next(iter(outputs.values())))
            outputs |= {expert: nothing for expert in order if expert not in outputs}
        rows = concatenate([outputs[expert] for expert in order])
        # Stock reduces what its experts give under autocast; kernels may give float32, which costs more to reduce.
        return rows if autocast_enabled(rows) else rows.to(hidden.dtype)


def _groups(top_k_index: torch.Tensor, demands: Sequence[Demand], by_choice: bool) -> dict[int, torch.Tensor]:
    """For each demanded expert, the positions of its (token, expert) pairs in the flattened [T * k].

    In the order in which stock computes them: as torch.sort leaves them, or by_choice with all first choices before all
    second ones.
    """
    if by_choice:
        tokens, k = top_k_index.shape
        order = torch.argsort(top_k_index.T.reshape(-1), stable=True)  # positions in [k * T]
        order = order % tokens * k + order // tokens
    else:
        # As transformers sorts for grouped_mm, not stable: with several threads torch's products on a CPU differ in the
        # last bits with a row's place among the others, so an expert must see its tokens in the very same order.
        order = torch.sort(top_k_index.reshape(-1))[1]
    start = 0
    if order.numel() > sum(d.tokens for d in demands):  # ids that are nobody's sort before 0 or behind the last expert
        start = int((top_k_index < 0).sum())
    groups = {}
    for demand in demands:
        groups[demand.expert] = order[start : start + demand.tokens]
        start += demand.tokens
    return groups

"""Carries out one plan for one MoE layer: decisions, movement and computing meet here and nowhere else.

One layer runs like this: the router's ids reach the host (the only synchronization of a layer), the planner plans, the
fetches start, the host's experts and the device's waves are computed, and all rows leave in router order, unweighted,
to be weighted and reduced once. The planner decides and the transfer engine waits; this module does neither.

If anything fails half-way, residency no longer says what slots hold. Everything is forgotten then: the next step starts
from an empty cache and is right again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from offmoe.compute.compute import ExpertCompute
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.config import CacheOptions
from offmoe.device.backend import Backend
from offmoe.errors import TraceError
from offmoe.policy.planner import Planner, build_planner
from offmoe.runtime.apart import carry_out_apart
from offmoe.runtime.calls import Done, LayerCall, Predictor, Slots, joined, to_host
from offmoe.runtime.device_decode import DeviceDecode
from offmoe.runtime.fill import BackgroundFill
from offmoe.runtime.host_experts import HostExperts
from offmoe.runtime.one_user import OneUser
from offmoe.runtime.plan_runner import PlanRunner
from offmoe.runtime.resident_experts import ResidentExperts
from offmoe.runtime.rows import ExpertOutputs, layer_input
from offmoe.trace.recorder import TraceWriter
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.fill_queue import FillProgress
from offmoe.transfer.slot_writer import NewSlots
from offmoe.transfer.staging import HostMemory
from offmoe.types import (
    Access,
    CacheStats,
    Demand,
    ExpertKey,
    Plan,
    count_demands,
    rank_predictions,
    single_demands,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ExpertExecutor:
    """Runs the experts of all MoE layers of one model; one thread at a time."""

    def __init__(
        self,
        planner: Planner,
        transfer: TransferEngine,
        compute: ExpertCompute,
        backend: Backend,
        stats: CacheStats,
        host: HostExperts | None = None,
        decode: DeviceDecode | None = None,
    ) -> None:
        """host: computes what plans leave to it. decode: computes steps of one token without asking the host."""
        self.planner, self._transfer, self._compute, self.backend = planner, transfer, compute, backend
        self._host, self.decode = host, decode
        self._runner = PlanRunner(compute, transfer, host)
        self.resident = ResidentExperts(transfer, compute)
        self.shape, self.stats = planner.shape, stats
        """Everything counted since the model was loaded."""
        self.user = OneUser()
        """The thread that runs the model."""
        self.predictor: Predictor | None = None
        self.trace: TraceWriter | None = None
        """The recording in progress."""
        self.gather: Callable[[LayerCall], torch.Tensor] | None = None
        """Takes calls of `run`, while several sequences are computed in step; it gives what `run` would."""
        self.routed = [[0] * count for count in self.shape.experts]
        """Tokens routed to each expert of each MoE layer since the model was loaded."""
        self._fill: BackgroundFill | None = None
        self._num_accesses = 0
        """Accesses planned since the model was loaded, which is when a recording begins."""
        self._sound = True
        """Whether slots hold what residency says. False while a layer runs, and after a failure cut it short."""

    def fill(self, order: Sequence[ExpertKey]) -> None:
        """Begin to read experts into free slots and RAM slots, in this order, unless an earlier fill still goes on."""
        if self._is_filling:
            return
        self._leave_device()
        self._fill = BackgroundFill(self._transfer, order, self.stats)
        self._fill.start(self.planner)

    @property
    def _is_filling(self) -> bool:
        return self._fill is not None and not self._fill.is_over

    @property
    def fill_progress(self) -> FillProgress:
        """How far the background fill has come. Any thread may ask."""
        return self._transfer.fill_progress

    @property
    def host_memory(self) -> HostMemory:
        """Staging buffers and RAM slots."""
        return self._transfer.host

    def run(self, layer: ExpertLayer, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The experts of one layer on the tokens routed to them.

        Args:
            hidden: [T, H], or [T * k, H] an input for each (token, expert) pair.
            ids: int [T, k], as routed. The row of an id that is no expert's is zero.
        Returns:
            Rows [T * k, H] in router order, unweighted.
        """
        with self.user:  # modules can be called past the model's forward, which takes this lock too
            call = LayerCall(layer, hidden, ids, self._predicted(layer.index))
            if self.gather is not None:
                return self.gather(call)
            return self._soundly(lambda: self._run([call], apart=False)[0])

    def run_summed(
        self, layer: ExpertLayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The weighted sum of the token's experts, [1, H], if the device computes it without the host; else None.

        Args:
            hidden: [T, H]. ids: [T, k], as routed. weights: [T, k].
        """
        decode = self.decode
        if decode is None or not decode.takes(layer.index, hidden, ids):
            return None
        with self.user:
            if not self._is_alone:
                return None
            return self._soundly(lambda: decode.run(self, layer.index, hidden, ids, weights))

    @property
    def _is_alone(self) -> bool:
        """Whether nothing but the accesses of single tokens changes slots now, so that the device may place misses."""
        return self.gather is None and not self._is_filling and self.planner.names_victims

    @contextmanager
    def on_device(self) -> Iterator[DeviceDecode | None]:
        """Surround launches of a step of one token; None: the host decides now. A failure within forgets everything."""
        with self.user:
            if not self._sound:
                self.forget()
            try:
                yield self.decode if self._is_alone else None
            except BaseException:
                self.forget()
                raise

    def end_step(self) -> None:
        """Note the end of a forward pass: what the device decided in it has been seen and counted.

        Raises:
            OffmoeError: Something went wrong in it. Everything is forgotten then.
        """
        if self.decode is not None and self._sound:  # else the next layer forgets everything
            self._soundly(self.decode.finish)

    def _leave_device(self) -> None:
        """Let the host decide and move from here on."""
        if self.decode is not None:
            self.decode.leave()

    def _settle(self) -> None:
        """Leave the device idle, and nothing on its way."""
        self._leave_device()
        self._transfer.settle()

    def _soundly(self, do: Callable[[], Result]) -> Result:
        """do(), which changes slots. Everything is forgotten if it fails: slots need not hold what residency says."""
        if not self._sound:
            self.forget()
        self._sound = False
        try:
            result = do()
        except BaseException:
            self.forget()
            raise
        self._sound = True
        return result

    def run_together(self, calls: Sequence[LayerCall], *, apart: bool = False) -> list[torch.Tensor]:
        """One layer for several callers, as one access: each expert is fetched once.

        Args:
            calls: All of one layer, at least one.
            apart: Compute each caller's rows by themselves, in the bits that `run` gives. An expert's rows are
                computed together otherwise, which is faster and changes last bits.
        Returns:
            Per caller, what `run` would give.
        """
        with self.user:
            return self._soundly(lambda: self._run(calls, apart))

    def _run(self, calls: Sequence[LayerCall], apart: bool) -> list[torch.Tensor]:
        self._leave_device()
        layer = calls[0].layer
        host_ids, predicted = to_host(calls, self.backend)
        if self.trace is not None:
            self.trace.record(layer.index, host_ids, predicted)
        num_experts, routed = self.shape.experts[layer.index], list[int]()
        if len(host_ids) == 1:
            routed, tail = host_ids[0].tolist(), 1
            demands = single_demands(routed, num_experts)
        else:
            demands, tail = count_demands(host_ids, num_experts)
        if not demands:
            return [call.hidden.new_zeros(call.ids.numel(), call.hidden.shape[-1]) for call in calls]
        ranked = () if predicted is None else rank_predictions(predicted, self.shape.experts[layer.index + 1])
        if self._fill is not None and not self._fill.is_over:
            self._settle_fills(self._fill, layer.index, demands)
        plan = self._plan(Access(layer.index, demands, tail, ranked))
        if apart and len(calls) > 1:
            return carry_out_apart(plan, calls, host_ids, self.shape, self._compute, self._transfer)
        if routed and plan.hits == len(routed) and len(calls) == 1 and calls[0].hidden.shape[0] == 1:
            rows = self._runner.token(layer, plan, routed, calls[0].hidden)
            if rows is not None:
                return [rows]
        hidden, ids = joined([call.hidden for call in calls]), joined([call.ids for call in calls])
        outputs = ExpertOutputs(layer_input(hidden, ids, host_ids, demands, layer.order), host_ids.size)
        self._runner.run(layer, plan, outputs)
        rows = outputs.in_router_order()
        return [rows] if len(calls) == 1 else list(rows.split([call.ids.numel() for call in calls]))

    @property
    def is_settled(self) -> bool:
        """Whether residents are what slots hold, and change by the accesses of this thread alone."""
        return self._sound and self.gather is None and not self._is_filling

    def computed(self, accesses: Iterable[Done]) -> None:
        """Record, plan and count accesses that hit, and whose predictions of `planner.ranks` did."""

        def count() -> None:
            for plan in (plans := [self.plan_access(*access) for access in accesses]):
                assert plan is not None and not (plan.misses or plan.prefetches)  # noqa: PT018
                self._transfer.computed([slot for _, slot in plan.waves[0].experts])
            if plans and plans[-1] is not None:
                self._transfer.read_ahead(plans[-1].read_ahead)

        with self.user:
            self._soundly(count)

    def plan_access(self, layer: int, ids: Sequence[int], predicted: Sequence[int] = ()) -> Plan | None:
        """Record, plan and count an access of one token that was carried out already; None if it demands nothing."""
        if self.trace is not None:
            self.trace.record(layer, np.array([ids]), np.array([predicted]) if predicted else None)
        demands = single_demands(ids, self.shape.experts[layer])
        return self._plan(Access(layer, demands, 1, tuple(predicted))) if demands else None

    def _plan(self, access: Access) -> Plan:
        """Plan and count an access."""
        plan = self.planner.plan(access)
        self._num_accesses += 1
        routed = self.routed[access.layer]
        for expert, tokens, _ in access.demands:
            routed[expert] += tokens
        self.stats.add(plan, self.shape)
        return plan

    def _settle_fills(self, fill: BackgroundFill, layer: int, demands: Sequence[Demand]) -> None:
        """Let landed fills take effect before an access, and record them."""
        slots, in_ram = fill.settle(layer, demands)
        if self.trace is not None:
            for experts, is_ram in ((slots, False), (in_ram, True)):
                for expert in experts:
                    self.trace.filled(self._num_accesses, expert, in_ram=is_ram)

    def forget(self) -> None:
        """Start again from an empty cache. A recording ends here, since its replay would not match."""
        if self.decode is not None:
            if self.decode.is_capturing:
                return  # nothing was launched, and the device cannot be waited for
            self.decode.abandon()
        self.planner = build_planner(self.planner.options, self.shape)
        self._transfer.forget()
        self._sound = True
        if self._fill is not None:
            self._fill.start(self.planner)
        if self.trace is not None:
            logger.warning("recording of the routing ends here: %s", self.trace.path)
            try:
                self.end_trace()
            except TraceError as error:  # the failure that led here is the error to show
                logger.error("%s", error)

    def resize(self, options: CacheOptions, slots: Callable[[int], Slots]) -> None:
        """Go on with other numbers of slots, without reading anything. A recording ends.

        Args:
            options: as they were, but for the numbers of slots, on_miss and miss_costs.
            slots: slots(number of scratch slots) gives all of them.
        Raises:
            CapacityError: The system does not give the memory. Nothing has changed then.
            OffmoeError: A fetch that was under way failed. Everything is forgotten then.
        """
        with self.user:
            self._soundly(self._settle)
            planner = copy.deepcopy(self.planner)
            kept = planner.resize(options)
            on_device, in_ram = slots(planner.num_scratch)
            commit = self._transfer.prepare(NewSlots(on_device, in_ram, planner.num_host_slots, kept))
            if self.trace is not None:
                logger.warning("recording of the routing ends here, as the model is resized: %s", self.trace.path)
                self.end_trace()
            self._sound = False
            for part in (self._compute, self._host, self.decode, self.resident):
                if part is not None:
                    part.slots_moved()
            commit()
            self._compute.slots_moved()
            self.planner, self._sound = planner, True
            if self._fill is not None:
                self._fill.start(planner)

    @property
    def is_invariant(self) -> bool:
        """Whether the rows of a token can be the same, bit for bit, whatever else a step computes."""
        return self._host is None and self._compute.is_invariant

    @property
    def computes_on_host(self) -> bool:
        """Whether plans may leave experts to the host."""
        return self._host is not None

    def end_trace(self) -> None:
        """Finish and write the recording, if there is one."""
        trace, self.trace = self.trace, None
        if trace is not None:
            trace.close()

    def predicts(self, layer: int) -> bool:
        """Whether a plan for `layer` could use predictions for the layer after it."""
        return self.predictor is not None and self.planner.wants_prediction(layer + 1)

    def _predicted(self, layer: int) -> torch.Tensor | None:
        """Predictions for the layer after `layer`, int [T, p], if a plan could use them."""
        return self.predictor.predict(layer + 1) if self.predictor is not None and self.predicts(layer) else None

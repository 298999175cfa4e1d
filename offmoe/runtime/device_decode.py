"""Steps of one token that the device computes without the host in its way (lag 1).

The kernels of a layer (compute/kernels/routed.py) place its misses themselves, in slots that the host named one access
before. The host launches, and learns from the device's log one layer or more behind what was routed: it plans the same
access, counts and records it, and names the next victims. What the device cannot place, because an expert is not in
pinned RAM, it leaves to the host and waits in the stream; the host places it like any other miss and answers.

Two threads read the log, one at a time: the computing thread behind each launch and at the end of a step, and a thread
that watches while the computing thread may be waiting for the device. At the end of a step the host has seen all of it,
so errors, statistics and recordings belong to their step.

While such steps run, nothing else changes slots: every other step begins with `leave`, and a step of one token after it
with `_enter`, which settles all transfers and writes the tables anew. **None of it has run on a GPU.**

Moves: what the kernels move; the host itself fetches only what it answers.
Bound: tens of microseconds of the host per layer, beside the device.
Must never: change a slot, a source or a RAM slot unless the device waits in that layer, or is idle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from offmoe.compute.kernels.routing_log import Entry, Verdict
from offmoe.compute.kernels.torch_ffn import autocast_enabled
from offmoe.device.backend import Backend, Capturer, Graph
from offmoe.errors import OffmoeError
from offmoe.policy.planner import Planner
from offmoe.runtime.device_tables import DeviceTables
from offmoe.transfer.engine import TransferEngine
from offmoe.types import Plan

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WATCH_S, POLL_S, PATIENCE = 5e-4, 5e-5, 500
"""Seconds between looks at the log: of the thread that watches, and at the end of a step; and how many looks without
news there are, some 50 ms, until the device is asked whether it still works."""

_HERE = nullcontext()


class Host(Protocol):
    """The decisions of the runtime, as the log needs them."""

    @property
    def planner(self) -> Planner: ...

    def plan_access(self, layer: int, ids: Sequence[int]) -> Plan | None:
        """Record, plan and count an access of one token. ids: -1 for no expert's. None: nothing is demanded."""


class Captured(NamedTuple):
    """Work of a step that was captured.

    graph: the work. layers: the MoE layers that it computes, in order. result: what the work gave; its tensors have
    values after a replay.
    """

    graph: Graph
    layers: tuple[int, ...]
    result: Any


class DeviceDecode:
    """The steps of one token of one model; for the thread that computes, but for `_watch`."""

    def __init__(self, tables: DeviceTables, transfer: TransferEngine, backend: Backend) -> None:
        """Nothing has to be allocated any more.

        Args:
            tables: of the model.
            transfer: fills slots and RAM slots.
            backend: the device.
        """
        self._tables, self._transfer, self._backend = tables, transfer, backend
        self._top_k = tables.shape.top_k
        self._aborted = tables.state.aborted.numpy().data
        self._host: Host | None = None
        self._active = False
        """Whether the device's tables are valid, and slots change by them alone."""
        self._launched = self._served = 0
        """Accesses that were launched, and those of them that the host has seen, since `_enter`."""
        self._serving, self._ended = threading.Lock(), backend.event()  # which marks the work of a step
        self._repeats: set[int] = set()
        """Accesses among them, by number, that an earlier one was for the planner."""
        self._capturing: list[int] | None = None
        """Layers that `run` was called for while work is captured; None: it launches."""
        self.captured: dict[object, Captured] = {}
        """Captured work, by whatever its owner chooses; empty again once slots have moved."""
        self._error: BaseException | None = None
        """What went wrong in the thread that watches."""
        self._stepping, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None

    def takes(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor) -> bool:
        """Whether a layer's input is one that the kernels compute: one token, in a dtype and form that they read."""
        return (
            hidden.shape[0] == 1  # `len` of a tensor takes 1 us
            and hidden.dtype in FLOATS
            and ids.shape == (1, self._top_k[layer])
            and ids.dtype == torch.int64
            and not autocast_enabled(hidden)
        )

    def run(
        self, host: Host, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Launch one layer; the host does not wait.

        Args:
            host: decides, from the first layer after `leave` to the next `leave`.
            hidden: [1, H]. ids: int64 [1, k], as routed. weights: [1, k].

        Returns:
            [1, H], the weighted sum.

        Raises:
            OffmoeError: an expert of an earlier layer could not be read, or the device has given up.
        """
        if self._capturing is None:
            self._begin(host, 1)
        else:
            self._capturing.append(layer)
        this = self._tables.layers[layer]
        with self._own_device():
            this.assign(ids)
            this.gather()
            out = this.compute(hidden, ids, weights)
        if self._capturing is None:
            self._look()
        return out

    @property
    def launched(self) -> int:
        """Accesses that were launched since the device has the slots."""
        return self._launched if self._active else 0

    @property
    def is_capturing(self) -> bool:
        """Whether `run` is called in order to be captured."""
        return self._capturing is not None

    def capture(self, host: Host, capturer: Capturer, work: Callable[[], object]) -> Captured:
        """Capture `work`, in which `run` is called; nothing is launched.

        Raises:
            Exception: `work` cannot be captured. Nothing has changed.
        """
        self._begin(host, 0)
        layers: list[int] = []
        self._capturing = layers
        try:
            with self._own_device():
                graph, result = capturer.capture(work)
        finally:
            self._capturing = None
        return Captured(graph, tuple(layers), result)

    def replay(self, host: Host, captured: Captured, *, repeats: bool = False) -> None:
        """Launch captured work; the host does not wait.

        Args:
            host: as `run` takes it.
            captured: what `capture` gave, since slots moved last.
            repeats: each access is the last one of its layer again, as a check needs it. The planner has it already.

        Raises:
            OffmoeError: as `run`.
        """
        first = self._begin(host, len(captured.layers))
        if repeats:
            self._repeats.update(range(first, self._launched))
        with self._own_device():
            captured.graph.replay()
        self._look()

    def _begin(self, host: Host, accesses: int) -> int:
        """Prepare to launch so many accesses; gives the number of the first."""
        if not self._active:
            self._enter(host)
        if not self._stepping.is_set():
            self._stepping.set()
        self._check()
        first = self._launched
        self._launched += accesses
        return first

    def _own_device(self) -> AbstractContextManager[object]:
        """Kernels start on the current device, so this makes it the model's."""
        index = self._backend.device.index
        is_current = index is None or torch.accelerator.current_device_index() == index
        return _HERE if is_current else torch.accelerator.device_index(index)

    def _look(self, wait_s: float = 0) -> bool:
        """Take what is in the log, unless the thread that watches does so for longer; gives whether it was taken."""
        if not self._serving.acquire(timeout=wait_s):
            return False
        try:
            self._serve()
        finally:
            self._serving.release()
        return True

    def finish(self) -> None:
        """Wait until the host has seen every access that was launched; to be called at the end of a step.

        Raises:
            OffmoeError: as `run`.
        """
        if not self._active:
            return
        looks = 0  # without news
        while self._served < self._launched:
            before, is_idle = self._served, looks > PATIENCE and self._ended.is_done()
            if self._look(WATCH_S) and is_idle and self._served < self._launched:
                raise OffmoeError("the device has ended a step without saying what each layer did.")
            self._check()
            if self._served == before:
                looks += 1
                if looks == PATIENCE:
                    self._ended.record(self._backend.compute)
                time.sleep(POLL_S)
        self._check()
        self._stepping.clear()

    def leave(self) -> None:
        """Give the slots back to the host, which moves experts from now on; `finish`, and the device is idle."""
        if not self._active:
            return
        if self._capturing is not None:
            raise RuntimeError("what the host decides cannot be captured")
        self.finish()
        self._transfer.computed(range(len(self._transfer.writer.arena)))
        self._drain()
        with self._serving:  # what the thread that watches has copied is done, and before what comes next
            self._transfer.writer.drain()
            self._active = False

    def abandon(self) -> None:
        """After a failure: let the device wait for nothing any more, and wait until it is idle. Tables are invalid."""
        if not self._active:
            return
        self._aborted[0] = 1
        self._drain()
        with self._serving:
            self._active = False
            self._error = None
            self._stepping.clear()

    def slots_moved(self) -> None:
        """Note that slots are elsewhere, and hold no reference to where they were. The device is idle."""
        assert not self._active
        self.captured.clear()
        self._tables.slots_moved()

    def close(self) -> None:
        """End the thread and release the tables; idempotent."""
        if self._closed:
            return
        self.abandon()
        self._closed = True
        self._stepping.set()
        if self._thread not in (None, threading.current_thread()):  # a model may be collected as garbage in any thread
            self._thread.join()
        self.captured.clear()
        self._tables.close()

    def _drain(self) -> None:
        """Wait until the compute stream is idle: no kernel reads RAM slots any more."""
        event = self._backend.event()
        event.record(self._backend.compute)
        event.synchronize()

    def _enter(self, host: Host) -> None:
        """Settle all transfers and write the tables: where experts are, and the first lists of victims."""
        self._transfer.settle()
        with self._serving:  # the thread that watches may still look at the log
            self._host, self._launched, self._served = host, 0, 0
            self._repeats.clear()
            self._tables.write(host.planner)
            self._active = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="offmoe-device-log", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        """Serve the device while the computing thread may be waiting for it: the body of a thread."""
        self._backend.enter_thread()
        while True:
            self._stepping.wait()
            if self._closed:
                return
            if self._serving.acquire(blocking=False):
                try:
                    self._serve()
                except BaseException as error:  # the computing thread raises it
                    self._error = error
                    self._aborted[0] = 1
                finally:
                    self._serving.release()
            time.sleep(WATCH_S)

    def _check(self) -> None:
        """Raise what the thread that watches ran into, or that the device has given up."""
        error = self._error
        if error is not None:
            raise error
        if self._aborted[0]:
            raise OffmoeError("the device waited too long for the host in the middle of a step and gave up.")

    def _serve(self) -> None:
        """Take every access that the device has logged. `_serving` is held."""
        if self._active and self._error is None:
            for entry in self._tables.state.log.read(self._top_k):
                self._take(entry)

    def _take(self, entry: Entry) -> None:
        """Plan an access that the device has carried out, or waits with; answer, and name the next victims."""
        assert self._host is not None
        if self._served in self._repeats:
            assert (entry.verdict, entry.misses) == (Verdict.ASSIGNED, 0), "an access that is repeated hits"
            self._repeats.discard(self._served)
            self._tables.after_repeat(entry.layer)
            self._served += 1
            return
        plan, planner = self._host.plan_access(entry.layer, entry.ids), self._host.planner
        assert entry.misses == (0 if plan is None else plan.misses), "device and planner differ"
        if entry.verdict is not Verdict.ASSIGNED:
            assert plan is not None
            self._answer(planner, plan)
        self._tables.after_access(planner, entry)
        self._served += 1

    def _answer(self, planner: Planner, plan: Plan) -> None:
        """Fetch what the device could not place, while it waits, and tell it where everything is."""
        transfer = self._transfer
        assert len(plan.waves) == 1, "one token fits the layer's slots"
        transfer.stream(plan.waves)
        for fetch in plan.waves[0].fetches:
            transfer.ready(fetch.slot)
            transfer.writer.landed(fetch.slot).synchronize()
        self._tables.settle(planner, plan.layer)

"""Code that stops in the middle of a forward pass, so that others reach the same place before it goes on.

A strand is a greenlet: all strands run in the thread that runs `Lockstep`, one at a time, so that nothing of torch or
of the runtime has to know about them. `torch.no_grad` has to surround them all: each of them would restore the mode
that it began in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet

from offmoe.errors import OffmoeError
from offmoe.runtime.calls import LayerCall
from offmoe.runtime.executor import ExpertExecutor


class Strand:
    """A function that runs until it waits: for the experts of a layer, or for `awaited`.

    Args:
        body: What to run. Its result or error is kept.
        samples: Whether it draws random numbers; it gets a sequence of its own.
    """

    def __init__(self, body: Callable[[], Any], samples: bool = False):
        self._body, self.samples = body, samples
        self.greenlet = greenlet(self._run)
        self.random: list[torch.Tensor] | None = None
        """The random state in which it goes on."""
        self.call: LayerCall | None = None
        """The layer that it waits for."""
        self.awaited: Any = None
        """What else it waits for."""
        self.requests: np.ndarray = np.zeros(0, np.int32)
        """The request of each sequence of its pass, int32 [sequences]."""
        self.tokens: torch.Tensor | None = None
        """Token ids of its pass, [sequences, length]; None: unknown."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False

    def _run(self, *_: object) -> None:
        try:
            self.result = self._body()
        except GreenletExit:
            raise
        except BaseException as error:
            self.error = error
        finally:
            self.ended = True


class Lockstep:
    """Runs strands to the same layer, then the layer for all of them.

    Args:
        executor: The runtime of the experts; its `gather` is taken while the lockstep is open.
        apart: Whether each strand's rows are computed by themselves.
    """

    def __init__(self, executor: ExpertExecutor, apart: bool):
        self._executor, self._backend, self._apart = executor, executor.backend, apart
        self._main = getcurrent()
        self.current: Strand | None = None
        """The strand that runs."""

    def gather(self, call: LayerCall) -> torch.Tensor:
        """Called in a strand: wait until the layer was computed for all strands."""
        strand = self.running()
        strand.call = call
        rows: torch.Tensor = self._main.switch()
        return rows

    def wait(self, awaited: Any) -> Any:
        """Called in a strand: wait until `resume` gives something."""
        self.running().awaited = awaited
        return self._main.switch()

    def resume(self, strand: Strand, value: Any = None) -> None:
        """Let a strand run until it waits or ends. value: what it has waited for."""
        before = self._backend.random_state() if strand.samples else None
        if strand.random is not None:
            self._backend.set_random_state(strand.random)
        strand.call = strand.awaited = None
        self.current = strand
        try:
            strand.greenlet.switch(value)
        finally:
            self.current = None
            if before is not None:
                strand.random = self._backend.random_state()
                self._backend.set_random_state(before)
        if isinstance(strand.error, KeyboardInterrupt | SystemExit):
            raise strand.error

    def layer(self, strands: Sequence[Strand], *, is_first: bool) -> None:
        """Compute the layer that all these strands wait for, and let them go on.

        Args:
            strands: Strands that wait for the experts of the same layer.
            is_first: Whether it is the first layer of a step.
        """
        calls = [strand.call for strand in strands if strand.call is not None]
        assert len(calls) == len(strands)
        assert len({call.layer.index for call in calls}) == 1
        if is_first:
            self._record(strands)
        apart = self._apart or len({id(call.layer) for call in calls}) > 1
        for strand, rows in zip(strands, self._executor.run_together(calls, apart=apart), strict=True):
            self.resume(strand, rows)

    def end(self, strand: Strand) -> None:
        """Unwind a strand that will not go on."""
        self.current = strand
        try:
            strand.greenlet.throw(GreenletExit)
        finally:
            self.current = None

    def running(self) -> Strand:
        """The strand that calls this. OffmoeError for a call from outside of all strands."""
        if self.current is None:
            raise OffmoeError("the model is generating for several prompts; use it when these are done.")
        return self.current

    def _record(self, strands: Sequence[Strand]) -> None:
        """Begin a step of the recording: the tokens of all strands, in the order of their rows."""
        trace = self._executor.trace
        if trace is None:
            return
        counts = [len(strand.call.ids) if strand.call is not None else 0 for strand in strands]
        requests = [np.repeat(s.requests, n // len(s.requests)) for s, n in zip(strands, counts, strict=True)]
        ids = [s.tokens for s in strands if s.tokens is not None and s.tokens.numel() == len(s.call.ids)]  # type: ignore[union-attr]
        token = torch.cat([t.reshape(-1) for t in ids]).cpu().numpy() if len(ids) == len(strands) else None
        trace.begin_step(sum(counts), np.concatenate(requests), token)

"""Rows of tokens between a device and the host, for the experts that the host computes.

Moves: the rows of the tokens whose experts the host computes, once each way per layer, through two pinned buffers.
Bound: latency of some tens of microseconds; rows are kilobytes, experts megabytes.
Must never: use a buffer before the copy into it, or out of it, is done.

Both copies are on the compute stream, where no expert's copy stands in front of them. The rows of a layer therefore
reach the host after the results of the layer before have left, which frees the buffer of results.
"""

from __future__ import annotations

import torch

from offmoe.device.backend import Backend, Event
from offmoe.device.host_buffers import HostBuffers
from offmoe.transfer.waits import WAITS, Waits


class HostExchange:
    """The two buffers of one model; for one thread at a time."""

    def __init__(self, backend: Backend, waits: Waits = WAITS) -> None:
        self._backend, self._waits = backend, waits
        self._inputs_copied, self._results_copied = backend.event(), backend.event()
        self._buffers: HostBuffers | None = None

    def to_host(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy rows [n, H] of the device into RAM; the result is valid until the next call."""
        buffer = self._buffer(0, rows)
        self._copy(buffer, rows, self._inputs_copied)
        self._waits.rows_on_host(self._inputs_copied)
        return buffer

    def results(self, like: torch.Tensor) -> torch.Tensor:
        """A buffer in RAM with the shape and dtype of `like`, to fill and hand to `to_device`; once per `to_host`."""
        return self._buffer(1, like)

    def to_device(self, results: torch.Tensor) -> torch.Tensor:
        """Copy the filled buffer to the device; computation there waits for the copy."""
        rows = torch.empty(results.shape, dtype=results.dtype, device=self._backend.device)
        self._copy(rows, results, self._results_copied)
        self._waits.rows_on_device(self._backend.compute, self._results_copied)
        return rows

    def close(self) -> None:
        """Unpin and release the buffers; idempotent."""
        if self._buffers is not None:
            self._inputs_copied.synchronize()  # nothing has waited for it if the host was interrupted
            self._results_copied.synchronize()
            self._buffers.close()
            self._buffers = None

    def _copy(self, destination: torch.Tensor, source: torch.Tensor, copied: Event) -> None:
        compute = self._backend.compute
        try:
            compute.copy(destination, source)
        finally:  # Ctrl-C may come in between, and `close` waits for the event
            copied.record(compute)

    def _buffer(self, i: int, rows: torch.Tensor) -> torch.Tensor:
        if self._buffers is None or self._buffers.nbytes < rows.nbytes:
            self.close()
            self._buffers = HostBuffers(2, rows.nbytes, pinning=self._backend)
        return self._buffers.tensor(i)[: rows.nbytes].view(rows.dtype).view(rows.shape)

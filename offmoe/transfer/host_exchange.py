"""Activations to the host and what it made of them back to the device; with transfer.py all waits of the package.

What moves: the rows of those tokens whose experts the host computes, once each way and layer, through pinned buffers.
Bound: latency, some tens of microseconds; rows are kilobytes, experts megabytes.

The waits, and what goes wrong without each (tests/transfer/test_host_exchange.py removes them):
  W8 the host waits until its rows have arrived       else it computes with what the buffer held before
  W9 compute waits until the results have arrived     else it sums what stood in memory
Both ways are on the compute stream, where no expert stands before them: the rows of a layer arrive after the results of
the layer before have left, which frees the buffer of results.
"""

from __future__ import annotations

import torch

from offmoe.device.arena import HostBuffers
from offmoe.device.backend import Backend


class HostExchange:
    """Buffers of one model; one thread at a time."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._arrived, self._left = backend.event(), backend.event()
        self._buffers: HostBuffers | None = None

    def to_host(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [n, H] of the device, in RAM; good until the next call."""
        buffer = self._buffer(0, rows)
        compute = self._backend.compute
        compute.copy(buffer, rows)
        self._arrived.record(compute)
        self._arrived.synchronize()  # W8
        return buffer

    def results(self, like: torch.Tensor) -> torch.Tensor:
        """A buffer for results of this shape and dtype, to be filled and given to `to_device`; once per `to_host`."""
        return self._buffer(1, like)

    def to_device(self, results: torch.Tensor) -> torch.Tensor:
        """The filled buffer on the device, once what computes there gets to it."""
        rows = torch.empty(results.shape, dtype=results.dtype, device=self._backend.device)
        compute = self._backend.compute
        compute.copy(rows, results)
        self._left.record(compute)
        compute.wait(self._left)  # W9
        return rows

    def close(self) -> None:
        """Unpin and release the buffers; idempotent."""
        if self._buffers is not None:
            self._left.synchronize()
            self._buffers.close()
            self._buffers = None

    def _buffer(self, i: int, rows: torch.Tensor) -> torch.Tensor:
        if self._buffers is None or self._buffers.nbytes < rows.nbytes:
            self.close()
            backend = self._backend
            self._buffers = HostBuffers(2, rows.nbytes, register=backend.pin, unregister=backend.unpin)
        return self._buffers.tensor(i)[: rows.nbytes].view(rows.dtype).view(rows.shape)

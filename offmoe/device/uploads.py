"""Small tables from the host to the device, for kernels that are launched next: where slots start, which rows go where.

Moves: some kilobytes per layer, on the compute stream, out of pinned buffers that take turns.
Bound: latency of one copy. The host does not wait: a copy from pageable memory would make it wait for all that the
compute stream still has to do, and with a miss for the expert on its way.
Must never: write to a buffer that a copy still reads.
"""

from __future__ import annotations

import numpy as np
import torch

from offmoe.device.backend import Backend
from offmoe.device.host_buffers import HostBuffers

BUFFER_BYTES = 64 << 10
"""Bytes of one buffer: the table of 5,000 blocks of a prompt. Larger ones are copied from pageable memory."""
BUFFERS = 8
"""Copies that may be under way before the host waits for the oldest. A layer needs one per wave, and the host waits for
the routing of each layer anyway."""


class Uploads:
    """The buffers of one model, for one thread at a time."""

    def __init__(self, backend: Backend) -> None:
        """Nothing is allocated before the first table.

        Args:
            backend: The device that the tables go to.
        """
        self._backend = backend
        self._buffers: HostBuffers | None = None
        self._words: list[torch.Tensor] = []
        """Per buffer: its memory as int32 [BUFFER_BYTES / 4]."""
        self._arrays: list[np.ndarray] = []
        """The same for numpy, which writes a table in 1 us."""
        self._copied = [backend.event() for _ in range(BUFFERS)]
        """Per buffer: marks the last copy out of it."""
        self._next = 0

    def __call__(self, values: np.ndarray) -> torch.Tensor:
        """Copy a table to the device.

        Args:
            values: int32 of any shape; free to change as soon as this returns.

        Returns:
            The same on the device, for the compute stream.
        """
        assert values.dtype == np.int32
        if self._buffers is None:
            self._buffers = buffers = HostBuffers(BUFFERS, BUFFER_BYTES, pinning=self._backend)
            self._words = [buffers.tensor(i)[:BUFFER_BYTES].view(torch.int32) for i in range(BUFFERS)]
            self._arrays = [words.numpy() for words in self._words]
        i, count = self._next, values.size
        if not self._buffers.pinned(i) or values.nbytes > BUFFER_BYTES:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self._backend.device)
        self._next = (i + 1) % BUFFERS
        self._copied[i].synchronize()
        self._arrays[i][:count] = values.reshape(-1)
        compute = self._backend.compute
        on_device = torch.empty(values.shape, dtype=torch.int32, device=self._backend.device)
        try:
            compute.copy(on_device, self._words[i][:count].view(values.shape))
        finally:  # Ctrl-C may come in between, and `close` waits for the event
            self._copied[i].record(compute)
        return on_device

    def close(self) -> None:
        """Wait for the copies and release the buffers; idempotent."""
        if self._buffers is not None:
            for event in self._copied:
                event.synchronize()
            self._buffers.close()
            self._buffers, self._words, self._arrays = None, [], []

"""How many threads torch computes with while a few tokens pass through a model that the C kernels compute.

After each operator that torch divides among threads, those of them that are done look for more work for some ms
(libgomp spins 300,000 times). Meanwhile they have half of a core that a thread of the C kernels needs. Decoding
Qwen3-30B's shape on 2 cores of a Zen 4 gave 20 tokens/s with torch's two threads, and in one of five rounds 4; with one
it gave 25 in all of them (`decode_vs_all_threads` of `tools/bench/whole_model.py` compares the two). What is left to
torch for a few tokens is small: norms, top-k, and attention as long as the context is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MOST_KV_BYTES = 4 << 20
"""Keys and values of a layer up to which one thread computes attention: 0.7 ms at 6 GB/s, which a core reads in it."""


class TorchThreads:
    """Torch's number of threads during passes of one model.

    Passes of several sequences may take turns within one thread (rows/strand.py), so the first one that needs one
    thread sets it and the last one sets back what was there.
    """

    def __init__(self, *, kernels_attend: bool = False) -> None:
        """kernels_attend: whether the C kernels compute attention of single tokens in all layers."""
        self.kernels_attend = kernels_attend
        self._passes, self._before = 0, 1

    @contextmanager
    def one(self) -> Iterator[None]:
        """Let torch compute with one thread until the block ends."""
        if self._passes == 0:
            self._before = torch.get_num_threads()
        self._passes += 1
        if self._before > 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            self._passes -= 1
            if self._passes == 0 and self._before > 1:
                torch.set_num_threads(self._before)

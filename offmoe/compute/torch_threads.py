"""How many threads torch computes with while the C kernels compute a model, or a part of it.

After each operator that torch divides among threads, those of them that are done look for more work for some ms
(libgomp spins 300,000 times). Meanwhile they have half of a core that a thread of the C kernels needs. Decoding
Qwen3-30B's shape on 2 cores of a Zen 4 gave 20 tokens/s with torch's two threads, and in one of five rounds 4; with one
it gave 25 in all of them (`decode_vs_all_threads` of `tools/bench/whole_model.py` compares the two). What is left to
torch for a few tokens is small: norms, top-k, and attention as long as the context is.

For many tokens torch multiplies, too, and keeps its threads; among the experts of a layer it only moves rows between
calls of the kernels. With one thread there, and the others ended before, prompts of Qwen3-30B's shape took 1.12 to 1.32
times as many tokens a second (6 to 256 tokens, 2 cores of a Zen 3, all experts resident). Machines with many cores were
not measured, where one thread that moves the rows of thousands of tokens may cost more than threads that spin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from offmoe.device.openmp import release_threads

MOST_KV_BYTES = 4 << 20
"""Keys and values of a layer up to which one thread computes attention: 0.7 ms at 6 GB/s, which a core reads in it."""


@contextmanager
def kernels_alone() -> Iterator[None]:
    """Leave the cores to the C kernels and to readers until the block ends: torch has one thread."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    try:
        release_threads()
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


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

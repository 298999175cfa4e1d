"""The messages between a benchmark and its contenders: plain values that travel as pickles.

The benchmark sends a Task, which is answered with None when the model is loaded, and then calls of the contender's
methods: the name of the method and its arguments, answered with what the method returns. An error is an answer too, and
the last one.

This module must never import anything heavy. A contender reads its task before it loads a library, so that its memory
cgroup counts everything that it allocates.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

OFFMOE, ACCELERATE = "offmoe", "accelerate"


@dataclass(frozen=True)
class Task:
    """What one contender has to load.

    Attributes:
        runtime: OFFMOE or ACCELERATE.
        model, device, dtype: as in `offmoe.from_pretrained`, as strings.
        device_memory: bytes for weights, slots and KV cache on the device, in either runtime.
        options: options of OffloadConfig; offmoe only.
        scratch: folder that accelerate writes experts to.
        routing: path of a trace whose routing is replayed; "" keeps the routers' own.
        threads: threads of torch; 0 keeps torch's default.
    """

    runtime: str
    model: str
    device: str
    dtype: str
    device_memory: int
    options: Mapping[str, Any] = field(default_factory=dict)
    scratch: str = ""
    routing: str = ""
    threads: int = 0


@dataclass(frozen=True)
class Pass:
    """One piece of work: continue a prompt.

    Attributes:
        prompt: token ids.
        new_tokens: tokens to generate.
        forced: token ids to continue with, whatever the model prefers; () continues greedily.
        row: row of the replayed routing that the first token of the prompt gets.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    forced: tuple[int, ...] = ()
    row: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result of one pass.

    Attributes:
        tokens: the likeliest token ids, even where other tokens were forced.
        digest: SHA-256 of all logits, in hexadecimal.
        ttft_s: seconds until the logits after the prompt (time to first token).
        token_s: seconds of every further token.
        stats: counts of decoding alone, by the names of CacheStats; None for accelerate.
        read_bytes: bytes that the process read from disk; None if the system does not tell.
    """

    tokens: tuple[int, ...]
    digest: str
    ttft_s: float
    token_s: tuple[float, ...]
    stats: Mapping[str, Any] | None
    read_bytes: int | None


@dataclass(frozen=True)
class Costs:
    """What the machine needs for a token at least, as measured in a contender.

    Attributes:
        compute_s: seconds per token when nothing has to move; None if it cannot be measured.
        link_gb_s: speed of copies to the device; None if slots are in RAM.
    """

    compute_s: float | None
    link_gb_s: float | None


def send(file: IO[bytes], message: object) -> None:
    """Write a message. The other process, which runs this very offmoe, reads it with `pickle.load`."""
    pickle.dump(message, file)
    file.flush()

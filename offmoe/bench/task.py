"""What a contender of a benchmark is asked to do, and what it answers: plain values that travel as JSON lines.

Must never import anything heavy: the contender reads its task before it loads a library, so that all it allocates is
counted in its cgroup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

OFFMOE, ACCELERATE = "offmoe", "accelerate"
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """One contender. device_memory: bytes of weights, slots and cache on the device, for either.

    options: of OffloadConfig (offmoe). scratch: a folder for what accelerate writes. routing: a trace to replay; ""
    lets the routers route. threads: of torch; 0 leaves them alone.
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
    """One piece of work: continue `prompt` by `new_tokens`. forced: the tokens to continue with, whatever the model
    says; () is greedy. row: of the replayed routing, for the first token."""

    prompt: tuple[int, ...]
    new_tokens: int
    forced: tuple[int, ...] = ()
    row: int = 0


@dataclass(frozen=True)
class Outcome:
    """What one pass did. tokens: those that the model found likeliest, also where others were forced.

    ttft_s: until the logits after the prompt. token_s: of every further token. digest: of all logits. stats: counts of
    the decoding alone (offmoe), by the names of CacheStats. read_bytes: that the process had from the disk in all; None
    where the system does not tell."""

    tokens: tuple[int, ...]
    digest: str
    ttft_s: float
    token_s: tuple[float, ...]
    stats: Mapping[str, Any] | None
    read_bytes: int | None


@dataclass(frozen=True)
class Costs:
    """Of the machine, as this contender sees it. compute_s: of a token when nothing has to move; None if it cannot be
    told. link_gb_s: to the device; None if slots are in RAM."""

    compute_s: float | None
    link_gb_s: float | None


@dataclass(frozen=True)
class Peak:
    """The most memory that was used, bytes. device: None where it is the process's own memory."""

    rss: int
    device: int | None


def to_line(kind: str, value: Any) -> str:
    """A message: what it is, and its fields."""
    return json.dumps({kind: asdict(value) if value is not None else None}) + "\n"


def from_line(line: str) -> tuple[str, Any]:
    """(kind, fields) of a message."""
    ((kind, value),) = json.loads(line).items()
    return kind, value


def restore(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of this module from a message's fields: lists become tuples."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    assert set(values) <= known
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

"""The state of a model's cache between two runs: how often each expert was used, and which ones were resident.

`model.offload.save_state(path)` writes it, `from_pretrained(state=path)` reads it. The file is JSON of format
"offmoe-state", version 1:

    model        the model's name, for people
    fingerprint  of its dense weights: a state is used with the model only that it was counted on
    experts      experts per MoE layer
    tokens       tokens that were counted, aged
    counts       per MoE layer, the tokens routed to each expert, aged
    residents    per MoE layer, the experts that had a slot
    in_ram       per MoE layer, the experts that had a RAM slot

A state only makes a run faster, so a file that cannot be used never stops one.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offmoe.errors import OffmoeError
from offmoe.files import replacing
from offmoe.types import ExpertKey

FORMAT, VERSION = "offmoe-state", 1
HEAD = f'{{"format":"{FORMAT}"'.encode()
"""The beginning of a file, without spaces."""
HALF_LIFE_TOKENS = 100_000
"""Tokens after which earlier counts weigh half: some hundred conversations, so that a state follows its user slowly."""


@dataclass(frozen=True)
class CacheState:
    """A checked state. The fields are those of the file."""

    model: str
    fingerprint: str
    tokens: float
    counts: tuple[tuple[float, ...], ...]
    residents: tuple[tuple[int, ...], ...]
    in_ram: tuple[tuple[int, ...], ...]

    @property
    def experts(self) -> tuple[int, ...]:
        return tuple(map(len, self.counts))

    @property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """Per MoE layer, the share of its tokens that were routed to each expert; 0 where a layer saw none."""
        tokens = max(self.tokens, 1.0)
        return tuple(tuple(round(min(count / tokens, 1.0), 8) for count in layer) for layer in self.counts)

    def resident_keys(self) -> frozenset[ExpertKey]:
        """The experts that had a slot or a RAM slot."""
        layers = [*enumerate(self.residents), *enumerate(self.in_ram)]
        return frozenset(ExpertKey(layer, expert) for layer, experts in layers for expert in experts)

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "experts": self.experts,
            "tokens": round(self.tokens, 3),
            "counts": [[round(count, 3) for count in layer] for layer in self.counts],
            "residents": self.residents,
            "in_ram": self.in_ram,
        }


def next_state(
    before: CacheState | None,
    *,
    model: str,
    fingerprint: str,
    tokens: int,
    counts: Sequence[Sequence[int]],
    slots: Iterable[ExpertKey],
    in_ram: Iterable[ExpertKey],
) -> CacheState:
    """The state after a run.

    Args:
        before: the state that the run began with, whose counts go on, aged by the run's tokens.
        model: the model's name.
        fingerprint: of the model.
        tokens: tokens that the run counted.
        counts: per MoE layer, the run's tokens routed to each expert.
        slots: experts that have a slot.
        in_ram: experts that have a RAM slot.
    """
    kept = 0.5 ** (tokens / HALF_LIFE_TOKENS)
    earlier: Sequence[Sequence[float]] = [[0.0] * len(layer) for layer in counts] if before is None else before.counts
    return CacheState(
        model,
        fingerprint,
        tokens + kept * (0.0 if before is None else before.tokens),
        tuple(
            tuple(now + kept * then for now, then in zip(layer, old, strict=True))
            for layer, old in zip(counts, earlier, strict=True)
        ),
        _by_layer(slots, len(counts)),
        _by_layer(in_ram, len(counts)),
    )


def write_state(path: str | os.PathLike[str], state: CacheState) -> None:
    """Write a state, atomically.

    Raises:
        OffmoeError: the file cannot be written.
    """
    try:
        if not Path(path).name:
            raise OSError(errno.EINVAL, "the name of a file is missing")
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(state.to_dict()), encoding="utf-8")
    except OSError as error:
        raise OffmoeError(
            f"the state {os.fspath(path)!r} cannot be written ({error.strerror}); choose another path or free space."
        ) from error


def begins_like_a_state(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as `write_state` writes it; also True without a file, and for one that ends early."""
    try:
        with open(path, "rb") as file:
            head = b"".join(file.read(4 * len(HEAD)).split())[: len(HEAD)]
    except OSError:  # it is refused, or said, where it is read or written
        return True
    return HEAD.startswith(head)


class UnusableState(OffmoeError):
    """A state file is damaged or of another model. Loading goes on without it."""


def read_state(path: str | os.PathLike[str], fingerprint: str, experts: tuple[int, ...]) -> CacheState:
    """Read a state and check it against a model.

    Args:
        path: the file.
        fingerprint: of the model.
        experts: experts of each MoE layer of the model.

    Raises:
        FileNotFoundError: there is no such file yet.
        UnusableState: the file is damaged, or of another model; the message is one line.
    """
    name = os.fspath(path)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableState(f"the state {name!r} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UnusableState(f"the state {name!r} is damaged: it is not JSON ({error}).") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UnusableState(f"{name!r} is no state: its format is not {FORMAT!r}.")
    if values.get("version") != VERSION:
        raise UnusableState(
            f"the state {name!r} has version {values.get('version')!r}; this offmoe reads version {VERSION}."
        )
    try:
        state = CacheState(
            str(values.get("model", "")),
            str(values["fingerprint"]),
            _number(values["tokens"]),
            tuple(tuple(map(_number, layer)) for layer in values["counts"]),
            *(tuple(tuple(map(int, layer)) for layer in values[part]) for part in ("residents", "in_ram")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UnusableState(f"the state {name!r} is damaged ({type(error).__name__}: {error}).") from error
    if state.fingerprint != fingerprint or state.experts != experts:
        of = f" ({state.model})" if state.model else ""
        raise UnusableState(f"the state {name!r} is of another model{of}.")
    for part in (state.residents, state.in_ram):
        if len(part) != len(experts) or any(
            not 0 <= expert < count for layer, count in zip(part, experts, strict=False) for expert in layer
        ):
            raise UnusableState(f"the state {name!r} is damaged: it names experts that the model does not have.")
    return state


def _number(value: object) -> float:
    """A count: a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return float(value)


def _by_layer(experts: Iterable[ExpertKey], layers: int) -> tuple[tuple[int, ...], ...]:
    of: list[list[int]] = [[] for _ in range(layers)]
    for layer, expert in experts:
        of[layer].append(expert)
    return tuple(tuple(sorted(ids)) for ids in of)

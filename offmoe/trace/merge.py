"""Merges recordings of one model into one trace, so that a cache is chosen for a whole workload.

A column that only some of the recordings have is dropped, because a reader would take it as known for all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import reduce

import numpy as np

from offmoe.errors import TraceError
from offmoe.trace.trace import NONE, Trace
from offmoe.types import CacheShape


def merge_traces(traces: Sequence[Trace]) -> Trace:
    """Concatenate traces; requests and steps are renumbered from 0 in their order.

    Token ids and probabilities are kept if all traces have them, cache options and parameter counts if all agree, and
    predictions if any trace has some. Background fills are left out: a replay of the whole goes on with one cache,
    where each recording began with its own.

    Raises:
        TraceError: there is no trace, or the traces are of different models or tokenizers.
    """
    if not traces:
        raise TraceError("there is nothing to merge; name at least one trace.")
    first = traces[0]
    for i, trace in enumerate(traces[1:], start=1):
        _check_shape(first.shape, trace.shape, i)
    nonempty = [trace for trace in traces if trace.tokens]
    requests, steps = [_dense(t.request) for t in nonempty], [_dense(t.step) for t in nonempty]
    return Trace(
        model=" + ".join(dict.fromkeys(trace.model for trace in traces)),
        shape=first.shape,
        experts=np.concatenate([first.experts[:0], *(t.experts for t in nonempty)]),
        request=_renumbered(requests),
        step=_renumbered(steps),
        token=_concatenated([t.token for t in nonempty]),
        probs=_concatenated([t.probs for t in nonempty]),
        predicted=_predictions(nonempty),
        options=first.options if all(t.options == first.options for t in traces) else None,
        pieces=reduce(_joined_pieces, [t.pieces for t in traces]),
        parameters=first.parameters if all(t.parameters == first.parameters for t in traces) else None,
    )


def _check_shape(first: CacheShape, other: CacheShape, index: int) -> None:
    if first.layers != other.layers:
        raise TraceError(
            f"trace {index + 1} has {other.layers} MoE layers, the first has {first.layers}: they are not of one model."
        )
    for name in (field.name for field in fields(CacheShape)):
        for layer, (a, b) in enumerate(zip(getattr(first, name), getattr(other, name), strict=True)):
            if a != b:
                raise TraceError(
                    f"trace {index + 1} has {name} {b} in MoE layer {layer}, the first has {a}: they are not of one "
                    "model, or not in one format."
                )


def _dense(numbers: np.ndarray) -> np.ndarray:
    """The numbers replaced by their ranks 0, 1, ... in ascending order."""
    return np.unique(numbers, return_inverse=True)[1].reshape(-1)


def _renumbered(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One int32 array in which each part counts on from the part before it."""
    starts = np.cumsum([0, *(int(part.max()) + 1 for part in parts)])
    return np.concatenate([np.zeros(0), *(p + s for p, s in zip(parts, starts, strict=False))]).astype(np.int32)


def _concatenated(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known and len(known) == len(parts) else None


def _predictions(traces: Sequence[Trace]) -> np.ndarray | None:
    """int16 [T, L, p] with the largest p; NONE where a trace has no predictions. None if no trace has any."""
    widths = [trace.predicted.shape[2] for trace in traces if trace.predicted is not None]
    if not widths:
        return None
    parts = []
    for trace in traces:
        part = np.full((trace.tokens, trace.shape.layers, max(widths)), NONE, np.int16)
        if trace.predicted is not None:
            part[:, :, : trace.predicted.shape[2]] = trace.predicted
        parts.append(part)
    return np.concatenate(parts)


def _joined_pieces(a: dict[int, str] | None, b: dict[int, str] | None) -> dict[int, str] | None:
    if a is None or b is None:
        return a if b is None else b
    for token in a.keys() & b.keys():
        if a[token] != b[token]:
            raise TraceError(
                f"token {token} is {a[token]!r} in one trace and {b[token]!r} in another: their tokenizers differ."
            )
    return {**a, **b}

"""Routing traces: which experts every token asked for, in memory and as a file (format v1, `.npz`), replayed without a
model.

What moves: one file, read and written whole. Bound: 2 bytes per (token, layer, k) and 2 per prediction. Must never
import torch, believe what a file says before it is checked, or leave a half-written file under the final name.

Arrays (interface.md): experts int16 [T, L, k] in router order, -1 = none · request int32 [T] · step int32 [T] ·
optional token int32 [T], probs float16 [T, L, k], predicted int16 [T, L, p] · header, a JSON string.

Prefill and decode are told apart by the steps: a token that shared its step with others of its request was prefill
(`Trace.prefill`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from offmoe.config import CacheOptions
from offmoe.errors import ConfigError, TraceError
from offmoe.files import replacing
from offmoe.text import plain
from offmoe.types import Access, CacheShape, count_demands, rank_predictions, single_demands

FORMAT, VERSION = "offmoe-trace", 1
NONE = -1


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters that a token can be multiplied with. dense: outside the experts, in every token's way
    (an input embedding, which is only looked up, does not count). expert: one expert of each MoE layer."""

    dense: int
    expert: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """A validated trace in memory; the arrays are those of the file."""

    model: str
    shape: CacheShape
    experts: np.ndarray
    request: np.ndarray
    step: np.ndarray
    token: np.ndarray | None = None
    probs: np.ndarray | None = None
    predicted: np.ndarray | None = None
    options: CacheOptions | None = None
    pieces: dict[int, str] | None = None
    parameters: Parameters | None = None

    @property
    def tokens(self) -> int:
        return len(self.step)

    @property
    def requests(self) -> int:
        return len(np.unique(self.request))

    @property
    def prefill(self) -> np.ndarray:
        """bool [T]: tokens that ran in one step with others of their request. A prompt of one token counts as decode,
        and so does the last token of a prompt that was fed in pieces, if it came alone.
        """
        pairs = np.stack([self.step, self.request], axis=1)
        _, index, rows = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
        return np.asarray(rows[index.reshape(-1)] > 1)

    def steps(self) -> Iterator[slice]:
        """Rows of each step, in order."""
        edges = np.flatnonzero(np.diff(self.step)) + 1
        bounds = [0, *edges.tolist(), self.tokens]
        for start, stop in pairwise(bounds):
            if stop > start:
                yield slice(start, stop)

    def accesses(self) -> Iterator[Access]:
        """What the runtime's planner was asked, in its order: layers within steps. Layers without demands are left
        out.
        """
        for rows in self.steps():
            yield from self.step_accesses(rows)

    def step_accesses(self, rows: slice) -> Iterator[Access]:
        """The accesses of one step."""
        layers, ids = self.shape.layers, self.experts[rows]
        single = ids[0].tolist() if len(ids) == 1 else None
        for layer in range(layers):
            if single is None:
                demands, tail = count_demands(ids[:, layer], self.shape.experts[layer])
            else:
                demands, tail = single_demands(single[layer], self.shape.experts[layer]), 1
            if not demands:
                continue
            predicted: tuple[int, ...] = ()
            if self.predicted is not None and layer + 1 < layers:
                predicted = rank_predictions(self.predicted[rows, layer + 1], self.shape.experts[layer + 1])
            yield Access(layer, demands, tail, predicted)


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace file atomically; TraceError when the disk refuses."""
    shape = trace.shape
    header: dict[str, Any] = {
        "model": trace.model,
        "experts": plain(shape.experts),
        "top_k": plain(shape.top_k),
        "expert_bytes": plain(shape.expert_bytes),
        "layers": shape.layers,
    }
    if trace.options is not None:
        header["config"] = trace.options.to_dict()
    if trace.pieces is not None:
        header["pieces"] = {str(i): text for i, text in trace.pieces.items()}
    if trace.parameters is not None:
        header["parameters"] = {"dense": trace.parameters.dense, "expert": plain(trace.parameters.expert)}
    optional = {"token": trace.token, "probs": trace.probs, "predicted": trace.predicted}
    arrays = {"experts": trace.experts, "request": trace.request, "step": trace.step}
    write_arrays(path, header, {**arrays, **{name: array for name, array in optional.items() if array is not None}})


def write_arrays(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a trace file atomically; TraceError when the disk refuses."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **header})
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, header=np.array(text), **arrays)
    except OSError as error:
        raise TraceError(
            f"cannot write the trace {path}: {error.strerror}. Free space or choose another path."
        ) from error


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """A trace file, checked; TraceError with the reason for anything that is not one."""
    name = str(path)
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds a bare array")
            arrays = {key: np.asarray(file[key]) for key in file.files}
    except FileNotFoundError:
        raise TraceError(
            f"{name} does not exist; record one with 'offmoe generate MODEL PROMPT --trace {name}'."
        ) from None
    except Exception as error:  # a damaged archive raises what zipfile, zlib, struct and numpy's header parser please
        raise TraceError(f"{name} is not a readable .npz trace: {type(error).__name__}: {error}") from error
    try:
        return _validated(arrays)
    except TraceError as error:
        raise TraceError(f"{name}: {error}") from None


def _validated(arrays: dict[str, np.ndarray]) -> Trace:
    header = _header(arrays)
    layers = header.get("layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers < 2**15:
        raise TraceError(f"'layers' in the header is {layers!r}, not a positive int.")
    shape = CacheShape(*(_per_layer(header, key, layers) for key in ("experts", "top_k", "expert_bytes")))
    experts = _array(arrays, "experts", "i", (None, layers, None))
    tokens, width = experts.shape[0], experts.shape[2]
    if width != max(shape.top_k):
        raise TraceError(f"'experts' has {width} ids per token and layer, the header's top_k is {max(shape.top_k)}.")
    limit = np.array(shape.experts)[None, :, None]
    _check_ids("experts", experts, limit)
    request = _array(arrays, "request", "i", (tokens,))
    step = _array(arrays, "step", "i", (tokens,))
    if tokens and (np.diff(step) < 0).any():
        raise TraceError("'step' decreases; tokens must stand in the order of their steps.")
    predicted = _array(arrays, "predicted", "i", (tokens, layers, None)) if "predicted" in arrays else None
    if predicted is not None:
        _check_ids("predicted", predicted, limit)
    probs = _array(arrays, "probs", "f", (tokens, layers, width)) if "probs" in arrays else None
    if probs is not None and not np.isfinite(probs).all():
        raise TraceError("'probs' holds a value that is not finite.")
    token = _array(arrays, "token", "i", (tokens,)) if "token" in arrays else None
    try:
        options = CacheOptions.from_dict(header["config"]) if header.get("config") is not None else None
    except (ConfigError, TypeError, ValueError) as error:
        raise TraceError(f"'config' in the header: {error}") from None
    return Trace(
        model=str(header.get("model", "")),
        shape=shape,
        experts=experts,
        request=request,
        step=step,
        token=token,
        probs=probs,
        predicted=predicted,
        options=options,
        pieces=_pieces(header),
        parameters=_parameters(header, layers),
    )


def _header(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if "header" not in arrays or arrays["header"].dtype.kind != "U" or arrays["header"].shape != ():
        raise TraceError("no 'header' string inside: this is not an offmoe trace.")
    try:
        header = json.loads(str(arrays["header"]))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError("the header does not say format 'offmoe-trace'.")
    if header.get("version") != VERSION:
        raise TraceError(f"trace version {header.get('version')!r} is unknown; this offmoe reads version {VERSION}.")
    return header


def _pieces(header: dict[str, Any]) -> dict[int, str] | None:
    pieces = header.get("pieces")
    if pieces is None:
        return None
    if not isinstance(pieces, dict) or not all(k.isdecimal() and isinstance(v, str) for k, v in pieces.items()):
        raise TraceError("'pieces' in the header must map token ids to texts.")
    return {int(k): v for k, v in pieces.items()}


def _parameters(header: dict[str, Any], layers: int) -> Parameters | None:
    counts = header.get("parameters")
    if counts is None:
        return None
    dense = counts.get("dense") if isinstance(counts, dict) else None
    if not isinstance(dense, int) or isinstance(dense, bool) or dense < 0:
        raise TraceError("'parameters' in the header must give 'dense' and 'expert' counts.")
    return Parameters(dense, _per_layer(counts, "expert", layers))


def _per_layer(header: dict[str, Any], key: str, layers: int) -> tuple[int, ...]:
    value = header.get(key)
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers or not all(
        isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**63 for v in values
    ):
        raise TraceError(f"{key!r} in the header must be a positive int, or one for each of the {layers} layers.")
    return tuple(values)


def _array(arrays: dict[str, np.ndarray], key: str, kind: str, shape: tuple[int | None, ...]) -> np.ndarray:
    if key not in arrays:
        raise TraceError(f"the array {key!r} is missing.")
    array = arrays[key]
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if array.dtype.kind != kind or not fits:
        raise TraceError(f"{key!r} is {array.dtype} {array.shape}; expected kind {kind!r} and shape {shape}.")
    return array


def _check_ids(key: str, ids: np.ndarray, limit: np.ndarray) -> None:
    if ids.size and ((ids < NONE) | (ids >= limit)).any():
        raise TraceError(f"{key!r} holds an id outside [0, experts).")

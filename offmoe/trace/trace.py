"""Routing traces: the experts that every token was routed to, in memory and as a file. A replay needs no model.

File format v1 is a compressed `.npz` (T tokens, L MoE layers, k = largest top_k, p predictions per token and layer):

    header     JSON string: format, version, model, layers, experts, top_k, expert_bytes, config, pieces, parameters
    experts    int16 [T, L, k], in router order, -1 = none
    request    int32 [T], the request of each token
    step       int32 [T], the forward pass of each token, ascending
    token      int32 [T], optional: token ids
    probs      float16 [T, L, k], optional: router weights
    predicted  int16 [T, L, p], optional: experts predicted for the layer, the likeliest first, -1 = none
    initial, events, initial_ram, events_ram, optional: experts that were filled in the background (fills.py)

Nothing in a file is believed before it is checked.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from offmoe.config import CacheOptions
from offmoe.errors import ConfigError, TraceError
from offmoe.files import replacing
from offmoe.text import plain
from offmoe.trace.fills import Fills
from offmoe.types import Access, CacheShape, count_demands, rank_predictions, single_demands

FORMAT, VERSION = "offmoe-trace", 1
NONE = -1


@dataclass(frozen=True)
class Parameters:
    """Parameters that a token is multiplied with.

    dense: outside the experts, for every token; an input embedding is looked up and does not count.
    expert: of one expert of each MoE layer.
    """

    dense: int
    expert: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """A checked trace in memory. The arrays are those of the file (see above).

    options: the cache of the run that was recorded; a replay with them gives the statistics of the run.
    pieces: text of the token ids that occur.
    fills: experts that were filled in the background; None if there were none. A replay with `options` needs them.
    """

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
    fills: Fills | None = None

    @property
    def tokens(self) -> int:
        return len(self.step)

    @property
    def requests(self) -> int:
        return len(np.unique(self.request))

    @property
    def prefill(self) -> np.ndarray:
        """bool [T]: tokens that shared their step with others of their request.

        A prompt of one token counts as decoding, and so does the last token of a prompt that was fed in pieces, if it
        ran alone.
        """
        pairs = np.stack([self.step, self.request], axis=1)  # [T, 2]
        _, index, rows = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
        return np.asarray(rows[index.reshape(-1)] > 1)

    def select(self, rows: np.ndarray, step: np.ndarray | None = None) -> Trace:
        """The trace of some tokens. What belongs to the whole run, `options` and `fills`, is left out.

        Args:
            rows: Numbers of tokens in their new order, or bool [T].
            step: Ascending int [number of rows]; None: as recorded.
        """

        def of(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[rows]

        return replace(
            self,
            experts=self.experts[rows],
            request=self.request[rows],
            step=self.step[rows] if step is None else step.astype(np.int32),
            token=of(self.token),
            probs=of(self.probs),
            predicted=of(self.predicted),
            options=None,
            fills=None,
        )

    def steps(self) -> Iterator[slice]:
        """The rows of each step, in order."""
        edges = np.flatnonzero(np.diff(self.step)) + 1
        bounds = [0, *edges.tolist(), self.tokens]
        for start, stop in pairwise(bounds):
            if stop > start:
                yield slice(start, stop)

    def accesses(self) -> Iterator[Access]:
        """The accesses that the runtime's planner saw, in its order: steps, and the layers of each step.

        Layers without demands are skipped.
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


def one_hot(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """bool [T, num_experts]: whether a token chose an expert. ids: int [T, k]; NONE chooses no expert."""
    chosen = np.zeros((len(ids), num_experts + 1), bool)
    chosen[np.arange(len(ids))[:, None], np.where(ids < 0, num_experts, ids)] = True
    return chosen[:, :num_experts]


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace as a file of format v1, atomically. TraceError if it cannot be written."""
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
    arrays |= {name: array for name, array in optional.items() if array is not None}
    write_arrays(path, header, arrays | ({} if trace.fills is None else trace.fills.to_arrays()))


def write_arrays(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a header and arrays as a trace file, atomically and unchecked. TraceError if it cannot be written."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **header})
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, header=np.array(text), **arrays)
    except OSError as error:
        raise TraceError(
            f"cannot write the trace {path}: {error.strerror}. Free space or choose another path."
        ) from error


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read and check a trace file.

    Raises:
        TraceError: the file does not exist, is damaged, or contradicts itself; the message gives the reason. Also when
            it was recorded with an eviction policy that is not registered (`offmoe.register_eviction`).
    """
    name = str(path)
    try:
        with open(path, "rb") as stream:
            if not zipfile.is_zipfile(stream):  # numpy would take it for a pickle, and advise to load it unsafely
                raise TraceError(f"{name} is not a .npz trace, or its end is missing; record it again.")
            stream.seek(0)
            file = np.load(stream, allow_pickle=False)
            arrays = {key: np.asarray(file[key]) for key in file.files}
    except FileNotFoundError:
        raise TraceError(
            f"{name} does not exist; record one with 'offmoe generate MODEL PROMPT --trace {name}'."
        ) from None
    except TraceError:
        raise
    except Exception as error:  # a damaged archive raises errors of zipfile, zlib, struct and numpy alike
        raise TraceError(f"{name} is not a readable .npz trace: {type(error).__name__}: {error}") from error
    try:
        return _validated(arrays)
    except TraceError as error:
        raise TraceError(f"{name}: {error}") from None


def _validated(arrays: dict[str, np.ndarray]) -> Trace:
    header = _header(arrays)
    layers = header.get("layers")
    if type(layers) is not int or not 0 < layers < 2**15:
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
        if options is not None:
            options.warm_counts_of(shape)
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
        fills=Fills.read(arrays, shape),
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
    if type(dense) is not int or dense < 0:
        raise TraceError("'parameters' in the header must give 'dense' and 'expert' counts.")
    return Parameters(dense, _per_layer(counts, "expert", layers))


def _per_layer(header: dict[str, Any], key: str, layers: int) -> tuple[int, ...]:
    value = header.get(key)
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers or not all(type(value) is int and 0 < value < 2**63 for value in values):
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

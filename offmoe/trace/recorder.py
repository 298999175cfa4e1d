"""Recording a run: its routing, layer by layer, as the trace that is written when the run ends.

What moves: a few small integers per token and layer, from the executor into memory, and once into a file (trace.py).
Bound: 2 bytes per (token, layer, k) and 2 per prediction, held in RAM until `close`. Must never import torch, and never
take the place of a file that is no trace.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from offmoe.config import CacheOptions
from offmoe.errors import ConfigError
from offmoe.files import temporary_path
from offmoe.trace.trace import NONE, Parameters, Trace, write_trace
from offmoe.types import CacheShape


class TraceWriter:
    """Collects the routing of a run and writes it once, atomically.

    `begin_step` before the layers of a forward pass, `record` per layer; `close` writes `path` (".npz" is not
    appended)."""

    def __init__(self, path: str | os.PathLike[str], model: str, shape: CacheShape, options: CacheOptions):
        self.path = Path(path)
        if not os.path.isdir(self.path.parent):
            raise ConfigError(
                f"trace={str(path)!r}: the folder {str(self.path.parent)!r} does not exist; create it first."
            )
        check_writable(self.path)
        self._model, self._shape, self._options = model, shape, options
        self._width = max(shape.top_k)
        self._experts: list[np.ndarray] = []
        self._predicted: list[np.ndarray] = []
        self._request: list[np.ndarray] = []
        self._token: list[np.ndarray] = []
        self._tokens_known = True
        self._any_predicted = False
        self._requests_before = 0
        self._recorded = self._shape.layers
        self._closed = False
        self.pieces: dict[int, str] = {}
        self.parameters: Parameters | None = None

    @property
    def tokens(self) -> int:
        """Recorded so far."""
        return sum(len(rows) for rows in self._request)

    def begin_step(self, rows: int, request: np.ndarray, token: np.ndarray | None) -> None:
        """A forward pass over `rows` tokens; request: int [rows], from 0 in each generation; token: int [rows] or
        None.
        """
        shape = (rows, self._shape.layers, self._width)
        self._recorded = -1
        self._experts.append(np.full(shape, NONE, np.int16))
        self._predicted.append(np.full(shape, NONE, np.int16))
        self._request.append(request.astype(np.int32) + self._requests_before)
        self._tokens_known &= token is not None
        self._token.append(np.zeros(rows, np.int32) if token is None else token.astype(np.int32))

    def next_requests(self) -> None:
        """Requests of the following steps are new ones."""
        if self._request:
            self._requests_before = int(self._request[-1].max()) + 1

    def record(self, layer: int, experts: np.ndarray, predicted: np.ndarray | None) -> None:
        """Routing of one layer in the current step.

        experts: int [rows, k] in router order. predicted: int [rows, p <= k], made for layer + 1, or None.
        """
        begun = layer > self._recorded  # else a part of the model runs by itself, without a step announced
        if not begun or len(experts) != len(self._experts[-1]):
            if begun and self._recorded < 0:  # the model routes other rows than its inputs: they are nobody's tokens
                for rows in (self._experts, self._predicted, self._request, self._token):
                    rows.pop()
            self.begin_step(len(experts), np.zeros(len(experts), np.int32), None)
        self._recorded = layer
        self._experts[-1][:, layer, : experts.shape[1]] = self._somebodys(experts, layer)
        if predicted is not None:
            width = min(predicted.shape[1], self._width)
            self._predicted[-1][:, layer + 1, :width] = self._somebodys(predicted[:, :width], layer + 1)
            self._any_predicted = True

    def _somebodys(self, experts: np.ndarray, layer: int) -> np.ndarray:
        return np.where((experts >= 0) & (experts < self._shape.experts[layer]), experts, NONE)

    def tokens_seen(self) -> list[int]:
        """Token ids that occur, ascending: those worth a text in `pieces`."""
        return np.unique(np.concatenate([np.zeros(0, np.int32), *self._token])).tolist() if self._tokens_known else []

    def close(self) -> None:
        """Write the file; nothing happens the second time."""
        if self._closed:
            return
        self._closed = True
        rows = [len(r) for r in self._request]
        width = (self._shape.layers, self._width)
        trace = Trace(
            self._model,
            self._shape,
            experts=np.concatenate([np.zeros((0, *width), np.int16), *self._experts]),
            request=np.concatenate([np.zeros(0, np.int32), *self._request]),
            step=np.repeat(np.arange(len(rows), dtype=np.int32), rows),
            token=np.concatenate(self._token) if self._tokens_known and rows else None,
            predicted=np.concatenate(self._predicted) if self._any_predicted else None,
            options=self._options,
            pieces=self.pieces or None,
            parameters=self.parameters,
        )
        write_trace(self.path, trace)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a trace's path before the run, so that no recording is lost and no other file replaced at its end.

    Raises:
        ConfigError: The path cannot be written, or holds something that is no trace.
    """
    path = Path(path)
    if os.path.exists(path) and not path.is_file():
        raise ConfigError(f"trace={str(path)!r} is a folder or a device; give the name of a file to write.")
    try:
        temporary = temporary_path(path)
        temporary.touch()
        temporary.unlink()
        foreign = os.path.exists(path) and not _begins_like_a_trace(path)
    except OSError as error:
        raise ConfigError(f"trace={str(path)!r}: cannot be written ({error.strerror}); choose another path.") from error
    if foreign:
        raise ConfigError(f"trace={str(path)!r} exists and is no trace; choose another path, or remove it first.")


def _begins_like_a_trace(path: Path) -> bool:
    """Whether a file is a zip archive, as .npz is, or empty."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"")

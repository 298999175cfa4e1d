"""Records the routing of a run, layer by layer, and writes it as a trace when the run ends.

A recording takes 2 bytes of RAM per token, layer and expert, and 2 per prediction, until `close` writes the file. A
file that is no trace is never replaced.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from offmoe import files
from offmoe.config import CacheOptions
from offmoe.errors import ConfigError, TraceError
from offmoe.trace.fills import Fills
from offmoe.trace.trace import NONE, Parameters, Trace, write_trace
from offmoe.types import CacheShape, ExpertKey


class TraceWriter:
    """Collects the routing of a run: `begin_step` before each forward pass, `record` per layer, `close` at the end.

    path: the file to write; ".npz" is not appended.
    """

    def __init__(self, path: str | os.PathLike[str], model: str, shape: CacheShape, options: CacheOptions):
        self.path = Path(path)
        check_writable(self.path)
        self._model, self._shape, self._options = model, shape, options
        self._width = max(shape.top_k)
        self._experts: list[np.ndarray] = []
        self._predicted: list[np.ndarray] = []
        self._request: list[np.ndarray] = []
        self._token: list[np.ndarray] = []
        self._tokens_known = True
        self._any_predicted = False
        self._fills: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = [], []
        self._requests_before = self._requests_after = 0
        """Requests recorded before those of the current generation, and with them."""
        self._recorded = self._shape.layers
        self._closed = False
        self.pieces: dict[int, str] = {}
        self.parameters: Parameters | None = None

    @property
    def tokens(self) -> int:
        """Tokens recorded so far."""
        return sum(len(rows) for rows in self._request)

    def begin_step(self, rows: int, request: np.ndarray, token: np.ndarray | None) -> None:
        """Begin a forward pass.

        Args:
            rows: its number of tokens.
            request: int [rows], the request of each token, from 0 in each generation.
            token: int [rows], token ids; None if they are unknown.
        """
        shape = (rows, self._shape.layers, self._width)
        self._recorded = -1
        self._experts.append(np.full(shape, NONE, np.int16))
        self._predicted.append(np.full(shape, NONE, np.int16))
        self._request.append(request.astype(np.int32) + self._requests_before)
        if rows:
            self._requests_after = max(self._requests_after, int(self._request[-1].max()) + 1)
        self._tokens_known &= token is not None
        self._token.append(np.zeros(rows, np.int32) if token is None else token.astype(np.int32))

    def next_requests(self) -> None:
        """The following steps belong to new requests."""
        self._requests_before = self._requests_after

    def record(self, layer: int, experts: np.ndarray, predicted: np.ndarray | None) -> None:
        """Record the routing of one layer in the current step.

        Args:
            experts: int [rows, k], in router order.
            predicted: int [rows, p <= k], predictions for layer + 1; None without a prediction.
        """
        begun = layer > self._recorded  # otherwise a part of the model runs alone, without `begin_step`
        if not begun or len(experts) != len(self._experts[-1]):
            if begun and self._recorded < 0:  # the rows routed are not the model's inputs, so tokens are unknown
                for rows in (self._experts, self._predicted, self._request, self._token):
                    rows.pop()
            self.begin_step(len(experts), np.zeros(len(experts), np.int32), None)
        self._recorded = layer
        self._experts[-1][:, layer, : experts.shape[1]] = self._existing(experts, layer)
        if predicted is not None:
            width = min(predicted.shape[1], self._width)
            self._predicted[-1][:, layer + 1, :width] = self._existing(predicted[:, :width], layer + 1)
            self._any_predicted = True

    def filled(self, access: int, expert: ExpertKey, *, in_ram: bool = False) -> None:
        """Record that an expert got a free slot, or a free RAM slot, in the background.

        Args:
            access: the number of accesses planned before, since the recording began.
            expert: the expert.
            in_ram: whether the slot is in RAM.
        """
        self._fills[in_ram].append((access, *expert))

    def _existing(self, experts: np.ndarray, layer: int) -> np.ndarray:
        """Expert ids, NONE in place of padding."""
        return np.where((experts >= 0) & (experts < self._shape.experts[layer]), experts, NONE)

    def tokens_seen(self) -> list[int]:
        """The token ids that occur, ascending; `pieces` needs their texts. Empty if token ids are unknown."""
        return np.unique(np.concatenate([np.zeros(0, np.int32), *self._token])).tolist() if self._tokens_known else []

    def close(self) -> None:
        """Write the file. A second call does nothing.

        Raises:
            TraceError: it cannot be written; the message names the temporary file that holds the recording.
        """
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
            fills=Fills.of(*self._fills),
        )
        try:
            write_trace(self.path, trace)
        except TraceError as error:
            elsewhere = _rescued(trace, self.path.name)
            if elsewhere is None:
                raise
            raise TraceError(f"{error} The recording stands in {elsewhere}; move it.") from error


def _rescued(trace: Trace, name: str) -> Path | None:
    """The file among the system's temporary ones that holds the trace now; None if there is no room either."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="offmoe-"))
    except OSError:
        return None
    try:
        write_trace(folder / name, trace)
    except TraceError:
        folder.rmdir()
        return None
    return folder / name


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a trace's path before the run, so that no recording is lost and no other file replaced at its end.

    Raises:
        ConfigError: The path cannot be written, or holds something that is no trace.
    """
    path = Path(path)
    files.check_writable(path, f"trace={str(path)!r}")
    try:
        foreign = os.path.exists(path) and not _begins_like_a_trace(path)
    except OSError as error:
        raise ConfigError(f"trace={str(path)!r}: cannot be read ({error.strerror}); choose another path.") from error
    if foreign:
        raise ConfigError(f"trace={str(path)!r} exists and is no trace; choose another path, or remove it first.")


def _begins_like_a_trace(path: Path) -> bool:
    """Whether a file is a zip archive, as .npz is, or empty."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"")

"""Recordings: what was recorded is read back from the trace, and nothing else is overwritten by it."""

from __future__ import annotations

import errno
import tempfile

import numpy as np
import pytest

from offmoe.config import CacheOptions
from offmoe.errors import ConfigError, TraceError
from offmoe.files import replacing
from offmoe.trace.recorder import TraceWriter
from offmoe.trace.trace import read_trace
from offmoe.types import CacheShape, Demand, rank_predictions

SHAPE = CacheShape((8, 8), (2, 2), (100, 200))


def test_round_trip(tmp_path):
    path = tmp_path / "run.npz"
    options = CacheOptions("lru", "layer", (2, 3), 1)
    writer = TraceWriter(path, "model", SHAPE, options)
    writer.next_requests()
    writer.begin_step(3, np.array([0, 0, 1]), np.array([7, 8, 9]))
    writer.record(0, np.array([[1, 2], [3, 4], [5, 6]]), np.array([[0, 1], [2, 3], [4, 5]]))
    writer.record(1, np.array([[0, 1], [2, 3], [4, 5]]), None)
    writer.next_requests()
    writer.begin_step(1, np.array([0]), np.array([9]))
    writer.record(0, np.array([[1, 2]]), None)
    writer.record(1, np.array([[6, 7]]), None)
    assert writer.tokens_seen() == [7, 8, 9]
    writer.pieces = {7: "a", 8: "b", 9: "ü"}
    writer.close()
    writer.close()
    trace = read_trace(path)
    assert trace.shape == SHAPE
    assert trace.options == options
    assert trace.pieces == {7: "a", 8: "b", 9: "ü"}
    assert trace.step.tolist() == [0, 0, 0, 1]
    assert trace.request.tolist() == [0, 0, 1, 2]
    assert trace.token.tolist() == [7, 8, 9, 9]
    got = list(trace.accesses())
    assert [a.layer for a in got] == [0, 1, 0, 1]
    assert got[0].demands == tuple(Demand(e, 1, 1) for e in range(1, 7))
    assert got[0].predicted == rank_predictions(np.array([[0, 1], [2, 3], [4, 5]]), 8) == (0, 2, 4, 1, 3, 5)
    assert got[2].predicted == ()
    assert not list(tmp_path.glob("*.partial"))


def test_an_empty_recording_is_a_trace(tmp_path):
    writer = TraceWriter(tmp_path / "e.npz", "m", SHAPE, CacheOptions(slots_per_layer=2))
    writer.close()
    assert read_trace(tmp_path / "e.npz").tokens == 0


@pytest.mark.parametrize("is_room_elsewhere", [True, False])
def test_a_recording_is_not_lost_with_its_disk(tmp_path, monkeypatch, is_room_elsewhere):
    def full(path, *rest):
        if path == tmp_path / "run.npz" or not is_room_elsewhere:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replacing(path, *rest)

    monkeypatch.setattr("offmoe.trace.trace.replacing", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = TraceWriter(tmp_path / "run.npz", "m", SHAPE, CacheOptions(slots_per_layer=2))
    writer.begin_step(1, np.array([0]), np.array([9]))
    writer.record(0, np.array([[1, 2]]), None)
    writer.record(1, np.array([[6, 7]]), None)
    with pytest.raises(TraceError, match=r"No space left on device\. Free space") as caught:
        writer.close()
    found = list(tmp_path.glob("offmoe-*/run.npz"))
    assert [str(path) in str(caught.value) for path in found] == [True] * is_room_elsewhere
    assert all(read_trace(path).tokens == 1 for path in found)


def test_a_missing_folder_is_named_before_the_run(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        TraceWriter(tmp_path / "nowhere" / "t.npz", "m", SHAPE, CacheOptions(slots_per_layer=2))


def test_what_is_no_trace_is_not_overwritten(tmp_path):
    other = tmp_path / "config.json"
    other.write_text("{}")
    with pytest.raises(ConfigError, match="is no trace"):
        TraceWriter(other, "model", SHAPE, CacheOptions())
    assert other.read_text() == "{}"
    TraceWriter(tmp_path / "t.npz", "model", SHAPE, CacheOptions()).close()
    TraceWriter(tmp_path / "t.npz", "model", SHAPE, CacheOptions()).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "t.npz"]

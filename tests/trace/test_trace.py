"""Traces as files and in memory: what is not a trace is refused with the reason."""

from __future__ import annotations

import io
import json
import random
import zipfile

import numpy as np
import pytest

from offmoe.config import CacheOptions
from offmoe.errors import TraceError
from offmoe.trace.fills import Fills
from offmoe.trace.trace import Parameters, Trace, read_trace, write_arrays, write_trace
from offmoe.types import CacheShape, Demand, count_demands

SHAPE = CacheShape((8, 8), (2, 2), (100, 200))
HEADER = {"model": "m", "layers": 2, "experts": 8, "top_k": 2, "expert_bytes": [100, 200]}


def arrays(tokens=4):
    rng = np.random.default_rng(0)
    return {
        "experts": rng.integers(0, 8, (tokens, 2, 2)).astype(np.int16),
        "request": np.zeros(tokens, np.int32),
        "step": np.arange(tokens, dtype=np.int32),
    }


def test_a_refused_write_is_a_trace_error(tmp_path):
    target = tmp_path / "t.npz"
    target.mkdir()
    with pytest.raises(TraceError, match="cannot write"):
        write_arrays(target, HEADER, arrays())
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, a: h.update(layers=3), "layers"),
        (lambda h, a: h.update(layers="two"), "'layers' in the header"),
        (lambda h, a: h.update(experts=[8]), "one for each of the 2 layers"),
        (lambda h, a: h.update(top_k=3), "top_k is 3"),
        (lambda h, a: h.update(config={"eviction": "magic"}), "magic"),
        (lambda h, a: h.update(config={"nonsense": 1}), "nonsense"),
        (lambda h, a: h.update(pieces=[1]), "'pieces'"),
        (lambda h, a: a["experts"].__setitem__((0, 0, 0), 8), "outside"),
        (lambda h, a: a["experts"].__setitem__((0, 0, 0), -2), "outside"),
        (lambda h, a: a.update(step=a["step"][::-1].copy()), "'step' decreases"),
        (lambda h, a: a.update(step=a["step"].astype(float)), "'step'"),
        (lambda h, a: a.pop("request"), "'request' is missing"),
        (lambda h, a: a.update(experts=a["experts"][:2]), "shape"),
        (lambda h, a: a.update(probs=np.full((4, 2, 2), np.nan, np.float16)), "not finite"),
        (lambda h, a: a.update(predicted=np.full((4, 2, 1), 99, np.int16)), "'predicted'"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, change, message):
    header, content = json.loads(json.dumps(HEADER)), arrays()
    change(header, content)
    write_arrays(tmp_path / "t.npz", header, content)
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "t.npz")


def test_versions_to_come_are_refused(tmp_path):
    write_arrays(tmp_path / "t.npz", {**HEADER, "version": 2}, arrays())
    with pytest.raises(TraceError, match="version 2"):
        read_trace(tmp_path / "t.npz")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", header=np.array([{}], dtype=object))
    (tmp_path / "empty.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as z:
        z.writestr("header.npy", b"nonsense")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(TraceError):
            read_trace(path)
    with pytest.raises(TraceError, match="does not exist"):
        read_trace(tmp_path / "absent.npz")


@pytest.mark.parametrize(("files", "seed"), [(200, 0), pytest.param(1000, 1, marks=pytest.mark.slow)])
def test_damaged_files_never_crash(tmp_path, files, seed):
    write_arrays(tmp_path / "good.npz", HEADER, arrays(50))
    good, rng = (tmp_path / "good.npz").read_bytes(), random.Random(seed)
    bad = tmp_path / "bad.npz"
    refused = 0
    for _ in range(files):
        data = bytearray(good)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 6)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        bad.write_bytes(data)
        try:
            read_trace(bad)
        except TraceError:
            refused += 1
    assert refused > files / 2


def test_demands_count_tokens_and_the_tail():
    experts = np.array([[0, 1]] * 100 + [[1, 2]] * 10 + [[-1, 9]])
    demands, tail = count_demands(experts, 8)
    assert tail == 64
    assert demands == (Demand(0, 100, 53), Demand(1, 110, 63), Demand(2, 10, 10))
    assert count_demands(np.array([[5, 3]]), 8) == ((Demand(3, 1, 1), Demand(5, 1, 1)), 1)
    assert count_demands(np.array([[-1, 8]]), 8) == ((), 1)


def test_reading_does_not_depend_on_the_name(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(json.dumps({"format": "offmoe-trace", "version": 1, **HEADER})), **arrays())
    (tmp_path / "noending").write_bytes(buffer.getvalue())
    assert read_trace(tmp_path / "noending").tokens == 4


# --- prefill and decode, and what the header may say


def test_prefill_shares_its_step_with_its_request():
    """A batch of two prompts, two single steps of both, and a prompt of one token."""
    trace = Trace(
        "m",
        SHAPE,
        np.zeros((11, 2, 2), np.int16),
        np.array([0, 0, 0, 1, 1, 0, 1, 0, 1, 2, 2], np.int32),
        np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 4], np.int32),
    )
    assert trace.prefill.tolist() == [True] * 5 + [False] * 6
    assert trace.requests == 3


def test_parameter_counts_are_read_back(tmp_path):
    for expert in (7, [7, 9]):
        write_arrays(tmp_path / "t.npz", {**HEADER, "parameters": {"dense": 5, "expert": expert}}, arrays())
        found = read_trace(tmp_path / "t.npz").parameters
        assert found == Parameters(5, (7, 7) if expert == 7 else (7, 9))


@pytest.mark.parametrize("value", [3, {"dense": -1, "expert": 7}, {"dense": 5}, {"dense": 5, "expert": [1, 2, 3]}])
def test_parameter_counts_that_are_none(tmp_path, value):
    write_arrays(tmp_path / "t.npz", {**HEADER, "parameters": value}, arrays())
    with pytest.raises(TraceError, match=r"'parameters'|'expert'"):
        read_trace(tmp_path / "t.npz")


@pytest.mark.parametrize("key", ["x", "\u00b2", "--1", ""])
def test_pieces_belong_to_token_ids(tmp_path, key):
    write_arrays(tmp_path / "t.npz", {**HEADER, "pieces": {key: "a"}}, arrays())
    with pytest.raises(TraceError, match="'pieces'"):
        read_trace(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("slots", "ram"),
    [
        ([(0, 1, 7), (0, 0, 2), (5, 1, 3)], []),
        ([], [(0, 0, 0)]),
        ([(3, 1, 1), (3, 0, 1)], [(0, 1, 1), (3, 1, 2)]),
    ],
)
def test_background_fills_are_read_as_they_were_written(tmp_path, slots, ram):
    trace = Trace("m", SHAPE, **arrays(), fills=Fills.of(slots, ram))
    write_trace(tmp_path / "t.npz", trace)
    read = read_trace(tmp_path / "t.npz").fills
    assert [tuple(row) for row in read.slots.tolist()] == slots
    assert [tuple(row) for row in read.ram.tolist()] == ram
    assert len(read) == len(slots) + len(ram)
    before = {}
    for tier, rows in enumerate((slots, ram)):
        for access, layer, expert in rows:
            before.setdefault(access, ([], []))[tier].append((layer, expert))
    assert read.by_access == before


def test_a_trace_without_fills_has_none(tmp_path):
    write_trace(tmp_path / "t.npz", Trace("m", SHAPE, **arrays(), fills=Fills.of([], [])))
    assert read_trace(tmp_path / "t.npz").fills is None


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("events", np.array([[0, 2, 0]], np.int32), "names a layer or an expert"),
        ("events", np.array([[0, 0, 8]], np.int32), "names a layer or an expert"),
        ("events", np.array([[-1, 0, 0]], np.int32), "count accesses from 0"),
        ("events_ram", np.array([[2, 0, 0], [1, 0, 1]], np.int32), "ascending"),
        ("events", np.array([[0, 0]], np.int32), r"expected ints of shape \(n, 3\)"),
        ("initial", np.array([[0.0, 0.0]]), r"expected ints of shape \(n, 2\)"),
        ("initial_ram", np.array([[0, -1]], np.int16), "names a layer or an expert"),
        ("events", np.array([[0, 2**40, 0]]), "names a layer or an expert"),
    ],
)
def test_fills_that_contradict_the_model_are_refused(tmp_path, name, array, message):
    write_arrays(tmp_path / "t.npz", HEADER, {**arrays(), name: array})
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "t.npz")


def test_warm_counts_of_another_model_are_refused(tmp_path):
    options = CacheOptions(warm_counts=((0.5,) * 8,)).to_dict()
    write_arrays(tmp_path / "t.npz", {**HEADER, "config": options}, arrays())
    with pytest.raises(TraceError, match="warm_counts were counted on another model"):
        read_trace(tmp_path / "t.npz")


def test_some_tokens_of_a_trace():
    content = arrays()
    whole = Trace("m", SHAPE, **content, token=np.arange(4, dtype=np.int32), options=CacheOptions(slots_per_layer=2))
    part = whole.select(np.array([3, 1]), np.array([0, 1]))
    assert part.token is not None
    assert (part.token.tolist(), part.step.tolist(), part.tokens) == ([3, 1], [0, 1], 2)
    assert (part.experts == content["experts"][[3, 1]]).all()
    assert (part.options, part.probs, part.predicted) == (None, None, None)
    assert whole.select(whole.step >= 2).step.tolist() == [2, 3]

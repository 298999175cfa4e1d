"""The state file: what a run takes to the next one, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmoe.errors import OffmoeError
from offmoe.state import HALF_LIFE_TOKENS, CacheState, UnusableState, next_state, read_state, write_state
from offmoe.types import ExpertKey

EXPERTS = (3, 2)


def run(before=None, tokens=10, counts=((10, 5, 5), (12, 8)), slots=((0, 0), (1, 1)), in_ram=((0, 2),)):
    return next_state(
        before,
        model="m",
        fingerprint="f",
        tokens=tokens,
        counts=counts,
        slots=[ExpertKey(*key) for key in slots],
        in_ram=[ExpertKey(*key) for key in in_ram],
    )


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = run()
    write_state(tmp_path / "s.json", state)
    assert read_state(tmp_path / "s.json", "f", EXPERTS) == state
    assert state.shares == ((1.0, 0.5, 0.5), (1.0, 0.8))
    assert state.residents == ((0,), (1,))
    assert state.resident_keys() == {ExpertKey(0, 0), ExpertKey(1, 1), ExpertKey(0, 2)}
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_counts_go_on_and_age():
    first = run(tokens=HALF_LIFE_TOKENS, counts=((100, 0, 0), (100, 0)))
    second = run(first, tokens=HALF_LIFE_TOKENS, counts=((0, 60, 0), (0, 60)))
    assert second.counts == ((50.0, 60.0, 0.0), (50.0, 60.0))
    assert second.tokens == 1.5 * HALF_LIFE_TOKENS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is no state"),
        ({"version": 2}, "has version 2; this offmoe reads version 1"),
        ({"fingerprint": "g"}, r"is of another model \(m\)"),
        ({"counts": [[1, 2], [3, 4]]}, "is of another model"),
        ({"counts": [[1, 2, -1], [3, 4]]}, "is damaged .*is no count"),
        ({"counts": [[1, 2, float("nan")], [3, 4]]}, "is damaged"),
        ({"counts": 5}, "is damaged"),
        ({"tokens": "many"}, "is damaged"),
        ({"residents": [[7], []]}, "names experts that the model does not have"),
        ({"in_ram": [[]]}, "names experts that the model does not have"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, change, message):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({**run().to_dict(), **change}))
    with pytest.raises(UnusableState, match=message) as caught:
        read_state(path, "f", EXPERTS)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_damage_is_never_another_error(tmp_path_factory, garbage, at):
    path = tmp_path_factory.mktemp("damaged") / "s.json"
    data = json.dumps(run().to_dict()).encode()
    path.write_bytes(data[:at] + garbage + data[at + len(garbage) :])
    try:
        state = read_state(path, "f", EXPERTS)
    except UnusableState:
        return
    assert isinstance(state, CacheState)
    assert state.experts == EXPERTS


def test_a_state_needs_the_name_of_a_file() -> None:
    with pytest.raises(OffmoeError, match="the name of a file is missing"):
        write_state("", run())


def test_a_state_that_cannot_be_written_names_the_file(tmp_path):
    with pytest.raises(OffmoeError, match="cannot be written"):
        write_state(tmp_path / "no" / "s.json", run())

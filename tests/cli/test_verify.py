"""`offmoe verify`: what holds is shown, what is broken is named, and what does not fit is a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from offmoe.budget import resolve
from offmoe.errors import CapacityError
from offmoe.measure import verify
from offmoe.measure.set_ups import NAMES
from offmoe.storage.store import ExpertStore
from offmoe.types import ExpertKey
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
SHORT = ("--device", "cpu", "--new-tokens", "2", "--json")
QUICK = ["stock", "resident", "few-slots", "prefetch", "without-slots", "smallest"]
ON_CPU = [name for name in NAMES if name not in ("ram-tier", "host-computed", "without-host", "captured")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def results(outcome: Outcome) -> dict[str, Any]:
    return {each["name"]: each for each in outcome.json["set_ups"]}


@pytest.mark.parametrize("names", [QUICK, pytest.param(ON_CPU, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_set_ups_of_a_cpu(
    offmoe: Run, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str]
) -> None:
    only = () if names is ON_CPU else ("--only", ",".join(names))
    outcome = offmoe("verify", checkpoint, *SHORT, "--dtype", "bfloat16", "--verbose", *only)
    found = results(outcome)
    assert outcome.status == 0
    assert list(found) == names
    assert found["stock"]["status"] == "reference"
    numeric = {"kernels", "kernels-few-slots"}
    assert {each["status"] for name, each in found.items() if name not in {"stock", *numeric}} == {"same"}
    assert {found[name]["status"] for name in numeric & found.keys()} <= {"same", "close"}, "this machine's kernels"
    assert found["resident"]["stats"]["evictions"] == 0 < found["few-slots"]["stats"]["evictions"]
    assert found["prefetch"]["stats"]["prefetched_used"] > 0
    assert found["without-slots"]["stats"]["host_computed"] > 0
    assert "come from disk in every pass" in caplog.text, "the smallest memory has no room for all dense layers"
    assert outcome.json["kept"]
    assert outcome.json["compared"] == len(names) - 1
    assert not (tmp_path / "cache").exists(), "no state is kept"


@pytest.fixture
def broken_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """break_in(name): in that set-up, one expert of the second MoE layer gets zeros in place of its bytes."""
    segments, load, running = ExpertStore.segments, verify._Comparison._run, [""]

    def break_in(name: str) -> None:
        def zeros(store: ExpertStore, key: ExpertKey, buffer: torch.Tensor) -> Sequence[torch.Tensor]:
            read = segments(store, key, buffer)
            is_broken = running[0] == name and key.layer == 1 and key.expert % 2 == 0
            return [torch.zeros_like(segment) for segment in read] if is_broken else read

        def noted(comparison: Any, set_up: Any) -> Any:
            running[0] = set_up.name
            return load(comparison, set_up)

        monkeypatch.setattr(ExpertStore, "segments", zeros)
        monkeypatch.setattr(verify._Comparison, "_run", noted)

    return break_in


def test_a_broken_promise_is_named(offmoe: Run, checkpoint: Path, broken_cache: Callable[[str], None]) -> None:
    broken_cache("few-slots")
    outcome = offmoe("verify", checkpoint, *SHORT, "--only", "resident,few-slots,without-slots")
    found = results(outcome)
    assert outcome.status == 1
    assert {name: each["status"] for name, each in found.items()} == {
        "resident": "reference",
        "few-slots": "differs",
        "without-slots": "same",
    }
    difference = found["few-slots"]["difference"]
    assert (difference["request"], difference["step"], difference["layer"]) == (0, 0, "model.layers.1")
    assert not outcome.json["kept"]
    for words in ("a promise is broken: few-slots: first at new token 1 of request 1", "from model.layers.1 on"):
        assert words in outcome.err


@pytest.mark.slow
def test_numeric_has_a_bound(offmoe: Run, checkpoint: Path, broken_cache: Callable[[str], None]) -> None:
    broken_cache("kernels-few-slots")
    outcome = offmoe("verify", checkpoint, *SHORT, "--only", "resident,kernels-few-slots")
    assert outcome.status == 1
    assert results(outcome)["kernels-few-slots"]["difference"]["divergence"] > verify.DIVERGENCE
    assert "a promise is broken: kernels-few-slots" in outcome.err


@pytest.mark.slow
def test_set_ups_that_agree_with_each_other_but_not_with_stock(
    offmoe: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = verify._Comparison._load_stock

    def other(comparison: Any) -> Any:
        model = load(comparison)
        model.lm_head.weight.data[3] += 0.5
        return model

    monkeypatch.setattr(verify._Comparison, "_load_stock", other)
    outcome = offmoe("verify", checkpoint, *SHORT, "--only", "stock,resident,few-slots")
    assert outcome.status == 1
    assert [each["status"] for each in outcome.json["set_ups"]] == ["reference", "differs", "differs"]
    assert results(outcome)["resident"]["difference"]["layer"] is None
    assert "they all differ from stock" in outcome.json["problems"][-1]


@pytest.mark.slow
def test_what_does_not_fit_is_a_line(offmoe: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOADING", 1e9)

    def divide(config: Any, *arguments: Any) -> Any:
        if config.slots_per_layer == (8, 8, 8):
            raise CapacityError("too large")
        return resolve.divide(config, *arguments)

    monkeypatch.setattr(verify, "divide", divide)
    outcome = offmoe(
        "verify", checkpoint, "--device", "cpu", "--new-tokens", "2", "--only", "stock,resident,few-slots,one-pool"
    )
    assert outcome.status == 0
    for words in (
        "stock (transformers without offmoe) left out: it needs about",
        "left out: too large",
        "reference",
        "same",
    ):
        assert words in outcome.out


def test_the_table_fits_a_pipe_and_a_verdict_ends_it(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("verify", checkpoint, *SHORT[:-1], "--only", "resident,kernels-few-slots")
    assert outcome.status == 0
    assert "…" not in outcome.out
    assert "kernels-few-slots" in outcome.out
    assert outcome.out.splitlines()[-1] == "Every promise is kept; set-ups compared: 1."


@pytest.mark.slow
def test_nothing_to_compare(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("verify", checkpoint, *SHORT, "--only", "few-slots")
    assert outcome.status == 1
    assert not outcome.json["kept"]
    assert "nothing could be compared" in outcome.err


@pytest.mark.slow
def test_a_set_up_in_which_nothing_moved_proves_nothing(
    offmoe: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offmoe.measure.set_ups.PREFETCH", 0)
    outcome = offmoe("verify", checkpoint, *SHORT, "--only", "few-slots,prefetch")
    assert results(outcome)["prefetch"]["status"] == "not used"
    assert outcome.status == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--only", "stok"], "--only 'stok' is no set-up; use some of: stock, resident"),
        (["--new-tokens", "513"], "--new-tokens 513"),
        (["--new-tokens", "0"], "'0' is not a positive whole number"),
        (["--new-tokens", "512"], "exceed the model's 512"),
        (["--prompt", ""], "PROMPT has no tokens"),
        (["--slots-per-layer", "3"], "unrecognized arguments"),
        (["--state", "file"], "unrecognized arguments"),
    ],
)
def test_bad_input(offmoe: Run, checkpoint: Path, more: list[str], says: str) -> None:
    outcome = offmoe("verify", checkpoint, "--device", "cpu", *more)
    assert (outcome.status, outcome.out) == (2, "")
    assert says in outcome.err


@pytest.mark.slow
def test_quantized_while_loading(offmoe: Run, checkpoint: Path) -> None:
    """No stock model has these weights, and all sums run in another order."""
    only = "stock,resident,few-slots,kernels"
    outcome = offmoe("verify", checkpoint, *SHORT, "--experts", "int8", "--only", only, "--prompt", "abc")
    found = results(outcome)
    assert outcome.status == 0
    assert {name: each["status"] for name, each in found.items()} == {
        "stock": "left out",
        "resident": "reference",
        "few-slots": found["few-slots"]["status"],
    }
    assert found["few-slots"]["status"] in ("same", "close")
    assert "other weights" in found["stock"]["reason"]

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offmoe.config import CacheOptions
from offmoe.simulate.replay import belady, replay, uniform_hit_rate
from offmoe.trace.trace import read_trace, write_arrays
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]

LAYERS, EXPERTS, TOP_K, TOKENS = 2, 8, 2, 120


def write(path: Path, top_k: int = TOP_K, predicted: bool = False, **header: Any) -> Path:
    """A trace of 120 single-token steps."""
    rng = np.random.default_rng(0)
    popularity = np.linspace(1, 4, EXPERTS)
    scores = rng.random((TOKENS, LAYERS, EXPERTS)) ** (1 / popularity)
    experts = np.argsort(-scores, axis=2)[:, :, :top_k].astype(np.int16)
    arrays: dict[str, np.ndarray] = {
        "experts": experts,
        "request": np.zeros(TOKENS, np.int32),
        "step": np.arange(TOKENS, dtype=np.int32),
    }
    if predicted:
        arrays["predicted"] = np.roll(experts, 1, axis=0)
    base = {"model": "random", "layers": LAYERS, "experts": EXPERTS, "top_k": top_k, "expert_bytes": 1000}
    write_arrays(path, {**base, **header}, arrays)
    return path


def test_json_is_what_the_simulator_says(offmoe: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz")
    found = offmoe("simulate", path, "--slots-per-layer", "3", "--eviction", "lru", "--json").json
    trace, options = read_trace(path), CacheOptions("lru", "layer", 3, 0)
    ours, best = replay(trace, options).stats, belady(trace, options)
    assert found["hit_rate"] == ours.hit_rate
    assert found["belady"] == best.hit_rate >= ours.hit_rate
    assert found["uniform"] == uniform_hit_rate(trace, options) == 3 / 8
    assert found["tokens_per_s"] is None
    assert found["stats"] == ours.to_dict()
    assert found["tokens"] == TOKENS
    assert found["config"] == {
        "eviction": "lru",
        "scope": "layer",
        "slots_per_layer": 3,
        "prefetch": 0,
        "half_life": 16.0,
        "on_miss": "fetch",
    }
    for i, layer in enumerate(found["by_layer"]):
        assert layer["demands"] == ours.by_layer[i].demands
        assert (layer["hit_rate"], layer["belady"]) == (ours.by_layer[i].hit_rate, best.by_layer[i].hit_rate)
        assert layer["uniform"] == 3 / 8


def test_options_come_from_the_header_unless_given(offmoe: Run, tmp_path: Path) -> None:
    recorded = CacheOptions("lru", "model", (3, 5), 2, 8.0)
    path = write(tmp_path / "t.npz", predicted=True, config=recorded.to_dict())
    found = offmoe("simulate", path, "--json").json
    assert found["stats"] == replay(read_trace(path), recorded).stats.to_dict()
    assert found["stats"]["prefetched"] > 0
    given = offmoe("simulate", path, "--json", "--prefetch", "0", "--slots-per-layer", "4,2", "--scope", "layer").json
    assert given["config"] == {
        "eviction": "lru",
        "scope": "layer",
        "slots_per_layer": [4, 2],
        "prefetch": 0,
        "half_life": 8.0,
        "on_miss": "fetch",
    }
    assert [layer["uniform"] for layer in given["by_layer"]] == [0.5, 0.25]


def test_lag_takes_what_goes_with_it(offmoe: Run, tmp_path: Path) -> None:
    recorded = CacheOptions("sieve", "layer", 4, 2)
    path = write(tmp_path / "t.npz", predicted=True, config=recorded.to_dict())
    found = offmoe("simulate", path, "--lag", "1", "--json").json
    lagged = CacheOptions("sieve", "layer", 4, 0, lag=1)
    assert found["stats"] == replay(read_trace(path), lagged).stats.to_dict()
    assert found["config"] == lagged.to_dict()
    assert "lag 1" in offmoe("simulate", path, "--lag", "1").out
    outcome = offmoe("simulate", path, "--lag", "1", "--prefetch", "2")
    assert outcome.status == 2
    assert "lag=1 takes prefetch=0" in outcome.err


def test_defaults_work_for_every_top_k(offmoe: Run, tmp_path: Path) -> None:
    found = offmoe("simulate", write(tmp_path / "t.npz", top_k=6), "--json").json
    assert found["config"]["slots_per_layer"] == 6
    assert found["config"]["eviction"] == "aged-lfu"
    assert found["config"]["prefetch"] == 0


def test_table_for_people(offmoe: Run, tmp_path: Path) -> None:
    outcome = offmoe("simulate", write(tmp_path / "t.npz"), "--slots-per-layer", "3")
    assert outcome.status == 0
    assert "3 slots per layer of 8" in outcome.out
    assert "Belady" in outcome.out
    assert "Of the gap from uniform routing to Belady" in outcome.out
    assert len([line for line in outcome.out.splitlines() if "%" in line and "│" in line]) == LAYERS + 1


def test_everything_resident_leaves_no_gap(offmoe: Run, tmp_path: Path) -> None:
    assert "No gap" in offmoe("simulate", write(tmp_path / "t.npz"), "--slots-per-layer", "8").out


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--slots-per-layer", "0,1", "--scope", "model"], 2, "1 slots in all"),
        (["--slots-per-layer", "3,3,3"], 2, "2 MoE layers"),
        (["--prefetch", "2"], 2, "holds no predictions"),
        (["--scope", "world"], 2, "layer, model"),
    ],
)
def test_options_that_do_not_fit(offmoe: Run, tmp_path: Path, options: list[str], status: int, says: str) -> None:
    outcome = offmoe("simulate", write(tmp_path / "t.npz"), *options)
    assert (outcome.status, outcome.out) == (status, "")
    assert says in outcome.err


def test_files_that_are_no_traces(offmoe: Run, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not a trace")
    for name, says in (("text.npz", "or its end is missing; record it again"), ("absent.npz", "does not exist")):
        outcome = offmoe("simulate", tmp_path / name)
        assert (outcome.status, outcome.out) == (1, "")
        assert says in outcome.err


def test_needs_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz")
    code = (
        "import sys; from offmoe.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "simulate", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Belady" in done.stdout


def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", model="caf\u00e9")
    done = subprocess.run(
        [sys.executable, "-m", "offmoe", "simulate", str(path)],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf?" in done.stdout
    assert "Belady" in done.stdout.decode("ascii")


def test_a_reader_that_left(tmp_path: Path) -> None:
    """`offmoe simulate ... | true`: no traceback, not from the interpreter's shutdown either."""
    path = write(tmp_path / "t.npz")
    child = subprocess.Popen(
        [sys.executable, "-m", "offmoe", "simulate", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    stderr = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait(timeout=60) == 1
    assert "Error" not in stderr
    assert "Traceback" not in stderr

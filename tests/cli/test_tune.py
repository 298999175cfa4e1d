from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import offmoe as package
from offmoe.cli.plot import Curve, Figure, page
from offmoe.config import EVICTIONS
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace, write_arrays
from tests.cli.conftest import Outcome
from tests.cli.test_simulate import write

Run = Callable[..., Outcome]

QUICK = ("--capacities", "2,4,8", "--jobs", "1")
COSTS = {"disk_gb_s": 1.0, "expert_us_device": 5, "dense_us_per_token": 50}


def two_requests(path: Path, predicted: bool = False) -> Path:
    """The trace of `write`, its second half a request of its own."""
    trace = read_trace(write(path, predicted=predicted))
    arrays = {"experts": trace.experts, "request": np.repeat([0, 1], 60).astype(np.int32), "step": trace.step}
    if trace.predicted is not None:
        arrays["predicted"] = trace.predicted
    header = {"model": "<b>&", "layers": 2, "experts": 8, "top_k": 2, "expert_bytes": 1000}
    write_arrays(path, header, arrays)
    return path


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    (tmp_path / "costs.json").write_text(json.dumps({"costs": COSTS}))
    return tmp_path / "costs.json"


def test_json(offmoe: Run, tmp_path: Path) -> None:
    found = offmoe("tune", two_requests(tmp_path / "t.npz"), *QUICK, "--slots-per-layer", "4", "--json").json
    assert found.keys() >= {"candidates", "best", "bounds", "knee", "predictions"}
    assert found["best"] == found["candidates"][0]
    assert found["best"]["bytes_per_token"] <= min(c["bytes_per_token"] for c in found["candidates"][:7])
    assert {c["eviction"] for c in found["candidates"]} == set(EVICTIONS)
    at_four = [
        c
        for c in found["candidates"]
        if c["slots_per_layer"] == 4 and c["scope"] == "layer" and c["on_miss"] == "fetch"
    ]
    assert {c["on_miss"] for c in found["candidates"]} == {"fetch", "cpu", "auto"}
    (bound,) = [b for b in found["bounds"] if b["slots_per_layer"] == 4]
    assert len(at_four) == len(EVICTIONS)
    assert all(c["hit_rate"] <= bound["belady"] <= bound["belady_bypass"] for c in at_four)
    assert bound["uniform"] == 0.5
    assert found["test_requests"] == [1]
    assert next(c for c in at_four if c["eviction"] == "lru")["gap_closed"] == 0
    assert found["best"]["tokens_per_s"] is None


def test_a_pool_of_every_size_is_tried_and_its_curve_goes_into_the_profile(offmoe: Run, tmp_path: Path) -> None:
    path, profile = two_requests(tmp_path / "t.npz"), tmp_path / "p.json"
    argv = ("tune", path, *QUICK, "--slots-per-layer", 4, "--eviction", "lru,aged-lfu", "-o", profile)
    pools = {int(slots): rate for slots, rate in offmoe(*argv, "--json").json["pools"].items()}
    assert min(pools) == 2
    assert max(pools) == read_trace(path).shape.num_keys
    assert list(pools.values()) == sorted(pools.values()), "more slots hit no less in this recording"
    assert "one pool" in offmoe(*argv).out
    rates = json.loads(profile.read_text())["expected"]["hit_rates"]
    assert rates["model"].keys() == {str(n) for n in pools}
    assert set(rates["layer"]) <= set(rates["model"])
    only = offmoe("tune", path, *QUICK, "--scope", "layer", "--eviction", "lru", "--json").json
    assert only["pools"] == {}


def test_tables_for_people(offmoe: Run, tmp_path: Path, costs: Path) -> None:
    path = two_requests(tmp_path / "t.npz", predicted=True)
    outcome = offmoe("tune", path, *QUICK)
    assert outcome.status == 0
    for words in ("with bypass", "doubling adds", "Knee: ", "unseen", "Predictions (recorded)", "fewest"):
        assert words in outcome.out
    priced = offmoe("tune", path, *QUICK, "--profile", costs, "--eviction", "lru,sieve")
    assert "tok/s" in priced.out
    assert "aged-lfu" not in priced.out
    assert "auto" in priced.out


def test_ram_is_swept_shown_and_written(offmoe: Run, tmp_path: Path) -> None:
    argv = ("tune", two_requests(tmp_path / "t.npz"), *QUICK, "--slots-per-layer", "4", "--eviction", "lru,aged-lfu")
    shown = offmoe(*argv, "--host-slots", "3,0", "-o", tmp_path / "p.json", "--json")
    best = shown.json["best"]
    assert best["host_slots"] == 3
    assert best["disk_bytes_per_token"] < best["bytes_per_token"]
    assert json.loads((tmp_path / "p.json").read_text())["cache"]["host_slots"] == 3
    assert "RAM" in offmoe(*argv, "--host-slots", "3,0").out
    assert "RAM" not in offmoe(*argv).out


def test_one_request_is_said_to_be_too_few(offmoe: Run, tmp_path: Path) -> None:
    assert "One request only" in offmoe("tune", write(tmp_path / "t.npz"), *QUICK, "--eviction", "lru").out


def test_a_budget_is_slots_in_bytes(offmoe: Run, tmp_path: Path) -> None:
    path = two_requests(tmp_path / "t.npz")
    found = offmoe("tune", path, *QUICK, "--budget", "6999", "--scope", "layer", "--eviction", "lru", "--json").json
    assert found["best"]["slots_per_layer"] == 3
    assert offmoe("tune", path, "--budget", "1999").status == 1


def test_a_plot_is_one_page(offmoe: Run, tmp_path: Path) -> None:
    path = two_requests(tmp_path / "t.npz")
    plot = tmp_path / "plot.html"
    assert offmoe("tune", path, *QUICK, "--eviction", "lru,sieve", "--plot", plot).status == 0
    text = plot.read_text()
    assert text.count("<polyline") == 5
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    assert "http" not in text
    assert "<script" not in text


def test_the_best_curve_at_the_chosen_size_leads_the_legend() -> None:
    curves = [Curve("worse", [(2, 0.1), (4, 0.5)]), Curve("better", [(2, 0.2), (4, 0.6)])]
    text = page(Figure("t", "n", curves, 4))
    assert text.index(">better</text>") < text.index(">worse</text>")


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--slots-per-layer", "0"], 2, "positive"),
        (["--slots-per-layer", "4", "--budget", "1MB"], 2, "both given"),
        (["--capacities", "4,x"], 2, "--capacities"),
        (["--eviction", "lru,fifo"], 2, "'fifo' is unknown"),
        (["--scope", "world"], 2, "scope='world'"),
        (["--prefetch", "2"], 2, "holds no predictions"),
        (["--budget", "much"], 2, "--budget='much'"),
        (["--plot", "x.pdf"], 2, ".html or .png"),
        (["--plot", "/no/such/x.html"], 2, "does not exist"),
        (["-o", "/no/such/x.json"], 2, "does not exist"),
        (["--profile", "/no/such/x.json"], 2, "cannot be read"),
    ],
)
def test_wrong_options(offmoe: Run, tmp_path: Path, options: list[str], status: int, says: str) -> None:
    outcome = offmoe("tune", write(tmp_path / "t.npz"), "--jobs", "1", *options)
    assert (outcome.status, outcome.out) == (status, "")
    assert says in outcome.err


def test_a_profile_without_costs_says_nothing_here(offmoe: Run, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"cache": {"eviction": "lru"}}')
    outcome = offmoe("tune", write(tmp_path / "t.npz"), "--profile", tmp_path / "p.json")
    assert outcome.status == 2
    assert "no 'costs'" in outcome.err


def test_an_empty_trace(offmoe: Run, tmp_path: Path) -> None:
    arrays = {name: np.zeros(0, np.int32) for name in ("request", "step")}
    arrays["experts"] = np.zeros((0, 2, 2), np.int16)
    header = {"model": "m", "layers": 2, "experts": 8, "top_k": 2, "expert_bytes": 1000}
    write_arrays(tmp_path / "t.npz", header, arrays)
    outcome = offmoe("tune", tmp_path / "t.npz")
    assert outcome.status == 2
    assert "is empty" in outcome.err


def test_needs_no_torch_and_works_over_processes(tmp_path: Path) -> None:
    path = two_requests(tmp_path / "t.npz")
    code = (
        "import sys\nfrom offmoe.cli import main\nif __name__ == '__main__':\n    status = main(sys.argv[1:])\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'\n    sys.exit(status)"
    )
    (tmp_path / "script.py").write_text(code)
    root = Path(package.__file__).parents[1]
    done = subprocess.run(
        [
            sys.executable,
            str(tmp_path / "script.py"),
            "tune",
            str(path),
            "--capacities",
            "2,4",
            "--jobs",
            "2",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]["hit_rate"] > 0


# --- what is tuned is what runs


@pytest.mark.parametrize("prefetch", ["0", "2"])
def test_a_tuned_profile_gives_the_predicted_hit_rate(
    offmoe: Run, checkpoint: Path, tmp_path: Path, prefetch: str, costs: Path
) -> None:
    trace, profile = tmp_path / "t.npz", tmp_path / "p.json"
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    # Not `generate`, whose background fill brings experts before they are demanded.
    run = ("trace", checkpoint, "--prompts", tmp_path / "prompts.txt", "--device", "cpu", "--max-new-tokens", 30)
    offmoe(*run, "--slots-per-layer", 3, "--prefetch", prefetch, "-o", trace)
    tuned = offmoe(
        *("tune", trace, "--capacities", "2,4,8", "--slots-per-layer", 4, "--jobs", 1, "-o", profile, "--json"),
        *("--profile", costs),
    ).json["best"]
    written = json.loads(profile.read_text())
    assert written["costs"].items() >= COSTS.items()
    assert written["expected"]["hit_rate"] == tuned["hit_rate"]
    ran = offmoe(*run, "--profile", profile, "-o", tmp_path / "again.npz", "--json").json["stats"]
    assert ran["hit_rate"] == tuned["hit_rate"] > 0
    simulated = offmoe("simulate", trace, "--profile", profile, "--json").json
    assert simulated["hit_rate"] == tuned["hit_rate"]
    assert simulated["tokens_per_s"] == tuned["tokens_per_s"]
    prompt = ("generate", checkpoint, "Once upon a time", "--device", "cpu", "--max-new-tokens", 2)
    other = offmoe(*prompt, "--profile", profile, "--slots-per-layer", 8, "--json").json
    assert other["memory"]["slots_per_layer"] == [8, 8, 8]


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_every_policy_runs_as_it_was_simulated(
    offmoe: Run, checkpoint: Path, tmp_path: Path, eviction: str, scope: str
) -> None:
    """The same tokens whatever is cached, and the counts that were predicted."""
    trace, profile = tmp_path / "t.npz", tmp_path / "p.json"
    first = package.from_pretrained(checkpoint, device="cpu", slots_per_layer=4, prefetch=0, trace=trace)
    ids = torch.arange(40, 60)[None]
    with first.offload:
        tokens = [first.generate(ids + n, max_new_tokens=12, do_sample=False) for n in range(2)]
    tuned = offmoe(
        *("tune", trace, "--eviction", eviction, "--scope", scope, "--slots-per-layer", 3, "--capacities", 3),
        *("--jobs", 1, "-o", profile, "--json"),
    ).json["best"]
    again = tmp_path / "again.npz"
    second = package.from_pretrained(checkpoint, device="cpu", profile=profile, trace=again)
    with second.offload:
        for n in range(2):
            assert torch.equal(second.generate(ids + n, max_new_tokens=12, do_sample=False), tokens[n])
        stats, config = second.offload.stats(), second.offload.config
    assert (config.eviction, config.scope, config.slots_per_layer) == (eviction, scope, 3)
    assert stats.hit_rate == tuned["hit_rate"]
    recorded = read_trace(again)
    assert recorded.options is not None
    assert (recorded.experts == read_trace(trace).experts).all()
    assert replay(recorded, recorded.options).stats == stats

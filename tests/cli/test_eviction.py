"""--eviction MODULE:CLASS: imported from the current folder, recorded in traces, asked for by their replay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from offmoe.trace.trace import read_trace
from tests.cli.test_simulate import write

MINE = """
from offmoe.policy.eviction import ScoredPolicy
class MRU(ScoredPolicy):
    now = 0.0
    def on_access(self, keys, demands, tail):
        self.now += 1.0
        for key in keys:
            self.scores[key] = self.now
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """A module with a policy in the current folder; its name is new in every test."""
    name = f"policy_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_policy_from_outside_generates_and_replays(offmoe, checkpoint, tmp_path, module):
    name, path = f"{module}:MRU", tmp_path / "run.npz"
    run = offmoe(
        *("generate", checkpoint, "ab", "--device", "cpu", "--slots-per-layer", 3, "--max-new-tokens", 6),
        *("--eviction", name, "--trace", path, "--json"),
    )
    assert run.status == 0, run.err
    assert read_trace(path).options.eviction == name
    replayed = offmoe("simulate", path, "--json").json
    assert replayed["config"]["eviction"] == name
    assert replayed["stats"]["misses"] == run.json["stats"]["misses"]
    unknown = subprocess.run(
        [sys.executable, "-m", "offmoe", "simulate", path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert unknown.returncode != 0
    assert f"offmoe.register_eviction('{name}', ...), or --eviction {name}" in unknown.stderr


def test_tune_and_inspect_take_it_too(offmoe, checkpoint, tmp_path, module):
    name = f"{module}:MRU"
    tuned = offmoe(
        *("tune", write(tmp_path / "t.npz"), "--capacities", "2,4", "--slots-per-layer", 4, "--jobs", 2),
        *("--eviction", f"lru,{name}", "--scope", "layer", "--json"),
    )
    assert tuned.status == 0, tuned.err
    assert {c["eviction"] for c in tuned.json["candidates"]} == {"lru", name}
    assert offmoe("inspect", checkpoint, "--device", "cpu", "--slots-per-layer", 3, "--eviction", name).status == 0


@pytest.mark.parametrize("verb", ["generate", "simulate", "tune", "trace", "bench", "inspect"])
@pytest.mark.parametrize("name", ["nowhere:Policy", "json:JSONDecoder"])
def test_what_is_no_policy_is_refused(offmoe, verb, name):
    found = offmoe(verb, "m", *(["p"] if verb == "generate" else []), "--eviction", name)
    assert found.status == 2
    assert f"eviction='{name}'" in found.err

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from offmoe.measure import calibrate
from offmoe.profile import read_profile
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "COPY_BYTES", 1 << 16)


def test_costs_go_into_the_profile_and_price_a_trace(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    profile, trace = tmp_path / "p.json", tmp_path / "t.npz"
    profile.write_text(json.dumps({"cache": {"eviction": "lru"}}))
    argv = ("calibrate", checkpoint, "--device", "cpu", "--seconds", "0")
    outcome = offmoe(*argv, "-o", profile, "--json")
    costs = outcome.json["costs"]
    assert {"disk_gb_s", "ram_gb_s", "expert_us_device", "expert_us_host", "expert_us_host_4"} <= costs.keys()
    assert f"written to {profile}" in outcome.err
    found = read_profile(profile)
    assert found.costs is not None
    assert (found.cache, found.costs.to_dict()) == ({"eviction": "lru"}, costs)
    assert offmoe("generate", checkpoint, "a", "--max-new-tokens", "8", "--device", "cpu", "--trace", trace).status == 0
    assert offmoe("simulate", trace, "--profile", profile, "--json").json["tokens_per_s"] > 0


def test_table(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("calibrate", checkpoint, "--device", "cpu", "--seconds", "0")
    assert outcome.status == 0
    assert "reading experts, all readers" in outcome.out
    assert "copies to the device" not in outcome.out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seconds", "-1"], "--seconds -1.0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["-o", "/no/such/p.json"], "the folder '/no/such' does not exist"),
    ],
)
def test_wrong_options(offmoe: Run, checkpoint: Path, more: list[str], says: str) -> None:
    outcome = offmoe("calibrate", checkpoint, *more)
    assert (outcome.status, outcome.out) == (2, "")
    assert says in outcome.err


def test_a_file_that_is_no_profile_is_kept(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text("[]")
    outcome = offmoe("calibrate", checkpoint, "-o", file)
    assert outcome.status == 2
    assert file.read_text() == "[]"

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from offmoe.measure import doctor
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]

NAMES = [
    "system",
    "libraries",
    "processor",
    "memory",
    "huge pages",
    "open files",
    "disk",
    "compiler",
    "device",
    "kernels",
    "pinning",
    "link",
]


@pytest.fixture(autouse=True)
def small_probe(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 2 << 20)
    monkeypatch.setattr(doctor, "REQUEST_BYTES", 1 << 20)


def test_json(offmoe: Run, tmp_path: Path) -> None:
    checks = offmoe("doctor", tmp_path, "--json").json["checks"]
    assert [check["name"] for check in checks] == NAMES
    for check in checks:
        assert check.keys() == {"name", "verdict", "found", "advice", "values"}
        assert check["verdict"] in ("ok", "warn", "fail")
        assert (check["verdict"] == "ok") == (check["advice"] == "")


def test_table(offmoe: Run, tmp_path: Path) -> None:
    outcome = offmoe("doctor", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    for words in ("this machine", "transformers", "GB/s"):
        assert words in outcome.out


def test_what_must_be_fixed_is_an_error_after_the_table(offmoe: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "libraries", lambda: doctor._check("libraries", "fail", "torch missing", "Install it."))
    outcome = offmoe("doctor", tmp_path)
    assert outcome.status == 1
    assert "libraries: Install it." in outcome.out
    assert outcome.err.endswith("until these are fixed: libraries.\n")


def test_no_folder(offmoe: Run) -> None:
    outcome = offmoe("doctor", "/no/such")
    assert (outcome.status, outcome.out) == (2, "")
    assert "'/no/such' is no folder" in outcome.err

"""tools/gpu_check without a GPU: the dry run goes through every section, and what cannot run is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "gpu_check"
SECTIONS = ["machine", "tests", "copies", "pinning", "kernels", "resident", "decode", "disk"]
FOUND = {
    "machine": {"versions", "direct_io", "device_free_gb", "work_folder_free_gb"},
    "tests": {"files"},
    "copies": {"gb_s", "link_gb_s"},
    "pinning": {"registered", "map_s_per_gb", "torch_says_pinned", "gb_s", "unregister_s"},
    "kernels": {"formats", "expert_bytes"},
    "resident": {"ms_per_token", "ratio_vs_stock", "overhead_us_per_layer"},
    "decode": {"hidden", "intermediate", "expert_mb", "disk_gb_s", "link_gb_s", "routing", "rows"},
    "disk": {"cold_ratio_5mb", "limit_gb_s"},
}
ROW = {
    *("slots", "prefetch", "ms_per_token", "hit_rate", "misses_per_token", "h2d_mb", "disk_mb", "h2d_gb_s"),
    *("stall_ms", "bound_ms", "share_of_bound"),
}


def run(folder: Path, *options: str) -> tuple[int, dict[str, object], str]:
    """Exit status, the JSON of the last line, and all of the output."""
    command = [sys.executable, str(TOOL), "--json", "--dir", str(folder), *options]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    status, report, output = run(tmp_path, "--device", "cpu", "--quick", "--out", str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report.keys() == {"ok", "device", "quick", "seconds", "sections"}
    sections = report["sections"]
    assert isinstance(sections, dict)
    assert list(sections) == SECTIONS
    assert {name: s["error"] for name, s in sections.items()} == dict.fromkeys(SECTIONS), output
    assert (status, report["ok"]) == (0, True)
    for name, section in sections.items():
        assert section.keys() == {"status", "error", "skipped", "found", "seconds"}
        assert section["status"] == "ok"
        assert FOUND[name] <= section["found"].keys()
    assert sections["tests"]["found"]["files"] == ["tests/test_gpu.py"]
    assert "needs a GPU" in sections["tests"]["skipped"][0]
    assert sections["pinning"]["found"]["registered"] is False
    rows = sections["decode"]["found"]["rows"]
    assert [(row["slots"], row["prefetch"]) for row in rows] == [(8, 0), (4, 0), (2, 0), (4, "auto")]
    assert all(row.keys() >= ROW for row in rows)
    assert rows[0]["h2d_mb"] == 0 < rows[1]["h2d_mb"] < rows[2]["h2d_mb"]
    assert "random weights" in output
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "nothing else is left behind"


@pytest.mark.slow
def test_without_the_device_nothing_passes(tmp_path: Path) -> None:
    status, report, _ = run(tmp_path, "--device", "cuda:4096", "--quick")
    sections = report["sections"]
    assert isinstance(sections, dict)
    assert (status, report["ok"]) == (1, False)
    assert sections["machine"]["status"] == "failed"
    assert "cuda:4096" in sections["machine"]["error"]
    assert {sections[name]["status"] for name in SECTIONS[1:]} == {"skipped"}
    assert list(tmp_path.iterdir()) == []

"""tools/gpu_check without a GPU: it says that there is none, and its dry run goes through every section."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.late_device import extension

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "gpu_check"
FOUND = {
    "machine": {"gpu", "versions", "direct_io", "device_free_gb", "work_folder_free_gb"},
    "parity": {"families"},
    "verify": {"set_ups", "reasons", "numeric_kl"},
    "copies": {"gb_s", "link_gb_s"},
    "pinning": {"registered", "map_s_per_gb", "register_s_per_gb", "torch_says_pinned", "gb_s", "unregister_s"},
    "kernels": {"formats", "expert_bytes", "errors", "memory_gb_s", "rows"},
    "resident": {"ms_per_token", "tokens_per_s", "ratio_vs_stock", "overhead_us_per_layer"},
    "budget": {"rows", "link_gb_s", "experts_gb"},
    "prefill": {"rows"},
    "soak": {"rounds", "seconds", "misses", "peak_bytes", "grown_bytes"},
}
MORE = {
    "tests": {"files"},
    "decode": {"hidden", "intermediate", "expert_mb", "disk_gb_s", "link_gb_s", "routing", "rows"},
    "disk": {"cold_ratio_5mb", "limit_gb_s"},
}
MEASURING = ("gpu.py", "gpu_section.py", "gpu_models.py", "gpu_kernels.py", "gpu_decode.py")
"""Modules that a dry run has to go through. gpu_hooks.py is what a CUDA device alone can run."""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool as a module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("gpu_check", str(TOOL))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def call(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """Run the tool in this process; the exit status."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, options)])
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)
    status = tool.main()
    assert isinstance(status, int)
    return status


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_without_a_gpu_it_says_so(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "has_gpu", lambda: False)
    assert call(tool, monkeypatch) == 3
    assert "no GPU that torch can use; --dry-run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torch_is_asked_for_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL)],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "no GPU that torch can use; --dry-run" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--only", "machine,parrot"], "'parrot' is no section; use some of: machine, parity"),
        (["--device", "cpu"], "'cpu' is no CUDA device; without a GPU use --dry-run"),
    ],
)
def test_wrong_options(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(tool, monkeypatch, *options)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_at_most_five_minutes_and_the_most_valuable_first(tool: ModuleType) -> None:
    assert tool.TOTAL_S + tool.GRACE_S <= 300
    assert list(tool.LIMITS_S) == list(FOUND)
    assert list(tool.MORE_S) == list(MORE)


@pytest.mark.parametrize("ignores", [False, True], ids=["interrupted", "killed"])
def test_a_section_that_hangs_is_ended(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, ignores: bool) -> None:
    monkeypatch.setattr(tool, "GRACE_S", 0.2 if ignores else 60)
    before = signal.getsignal(signal.SIGINT)
    # A process inherits that a signal is ignored, as in the background of a shell; with a handler it begins anew.
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignores else signal.default_int_handler)
    try:
        status, stopped = tool.run(["-c", "import threading; threading.Event().wait()"], 0.2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped is not None
    assert stopped.endswith("killed" if ignores else "interrupted")
    assert status != 0


def test_sections_are_independent_of_each_other(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One section fails with figures, one breaks the tool itself, one runs."""

    def run(command: list[str], limit_s: float, **more: str) -> tuple[int, str | None]:
        name, work = command[1], Path(command[command.index("--work") + 1])
        if name == "copies":
            raise OSError("the process could not be started")
        state = {"found": {"gb_s": {"1": 2.0}}, "skipped": ["a part"], "error": "broken" if name == "parity" else None}
        (work / f"{name}.json").write_text(json.dumps(state))
        (work / "left").mkdir()
        return int(name == "parity"), None

    monkeypatch.setattr(tool, "run", run)
    out = tmp_path / "results.jsonl"
    options = ("--dry-run", "--only", "pinning,parity,copies", "--out", out, "--dir", tmp_path)
    assert call(tool, monkeypatch, *options) == 1
    summary = lines_of(out)[-1]
    assert list(summary["sections"]) == ["parity", "copies", "pinning"], "in their own order"
    assert {name: section["status"] for name, section in summary["sections"].items()} == {
        "parity": "failed",
        "copies": "failed",
        "pinning": "ok",
    }
    assert summary["sections"]["parity"]["found"] == {"gb_s": {"1": 2.0}}
    assert (summary["ok"], summary["dry_run"]) == (False, True)
    shown = capsys.readouterr().out
    for words in ("left out: a part", "broken", "OSError: the process could not be started"):
        assert words in shown
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"], "nothing else is left behind"


def test_nothing_runs_on_a_machine_that_fails(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(command: list[str], limit_s: float, **more: str) -> tuple[int, str | None]:
        ran.append(command[1])
        return 1, None

    monkeypatch.setattr(tool, "run", run)
    out = tmp_path / "results.jsonl"
    assert call(tool, monkeypatch, "--dry-run", "--out", out, "--dir", tmp_path) == 1
    assert ran == ["machine"]
    states = {name: section["status"] for name, section in lines_of(out)[-1]["sections"].items()}
    assert states == {name: "failed" if name == "machine" else "skipped" for name in FOUND}


@pytest.mark.slow
def test_dry_run(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every section on the late device, and nearly every line of what they run."""
    pytest.importorskip("triton")
    pytest.importorskip("coverage")
    extension.build()
    run = tool.run
    data = tmp_path / "coverage"
    data.mkdir()

    def watched(command: list[str], limit_s: float, **more: str) -> Any:
        if command[0] != "-m":
            include = ",".join(str(ROOT / "tools" / "bench" / name) for name in MEASURING)
            command = [
                "-m",
                "coverage",
                "run",
                "--rcfile=/dev/null",
                "--parallel-mode",
                f"--data-file={data}/data",
                f"--include={include}",
                *command,
            ]
        return run(command, limit_s, **more)

    monkeypatch.setattr(tool, "run", watched)
    out, work = tmp_path / "results.jsonl", tmp_path / "work"
    work.mkdir()
    expected = FOUND | MORE
    status = call(tool, monkeypatch, "--dry-run", "--only", ",".join(expected), "--out", out, "--dir", work)
    output = capfd.readouterr()
    summary = lines_of(out)[-1]
    found = summary["sections"]
    assert {name: section["error"] for name, section in found.items()} == dict.fromkeys(expected), output
    assert (status, summary["ok"]) == (0, True)
    assert list(found) == list(expected)
    for name, section in found.items():
        assert expected[name] <= section["found"].keys(), name
    assert {line["section"] for line in lines_of(out)[:-1]} == set(expected) - {"tests"}, "written as they came"
    assert set(found["verify"]["found"]["set_ups"].values()) <= {"reference", "same", "close", "left out"}
    assert found["verify"]["found"]["set_ups"]["host-computed"] == "close"
    assert found["pinning"]["found"]["registered"] is True
    rows = found["budget"]["found"]["rows"]
    assert [row["prefetch"] for row in rows] == [0, "auto"]
    assert all(0 < row["hit_rate"] < 1 for row in rows)
    assert [row["tokens"] for row in found["prefill"]["found"]["rows"]] == [16, 70]
    assert all(max(errors.values()) < 5e-3 for errors in found["kernels"]["found"]["errors"].values())
    assert list(work.iterdir()) == []
    check_lines(data)


def check_lines(data: Path) -> None:
    """Every function of the measurements was entered, and few lines were not reached: those of what is left out."""
    import coverage

    merged = coverage.Coverage(data_file=str(data / "data"), config_file=False)
    merged.combine([str(data)])
    for name in MEASURING:
        file = ROOT / "tools" / "bench" / name
        _, statements, _, missing, _ = merged.analysis2(str(file))
        reached = set(statements) - set(missing)
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        inside = {f.name: set(range(f.body[0].lineno, (f.end_lineno or 0) + 1)) for f in functions}
        assert [function for function, lines in inside.items() if not lines & reached] == [], name
        assert len(missing) <= 0.2 * len(statements), (name, missing)

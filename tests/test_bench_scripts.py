"""The scripts of tools/bench run from any folder, offmoe installed or not; what they measure is not tested here."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "tools" / "bench"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd="/", env=kept | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_path_is_mended_before_anything_else_is_imported(script: Path) -> None:
    names = [
        name.partition(".")[0]
        for node in ast.parse(script.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    others = [name for name in names if name not in sys.stdlib_module_names]
    assert others[:1] in ([], ["checkout"])


def test_from_another_folder() -> None:
    done = run(sys.executable, FOLDER / "quality.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--all" in done.stdout


def test_the_scripts_are_no_packages_of_others() -> None:
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(FOLDER)!r})
import checkout
assert importlib.util.find_spec("tools.bench.kernels").origin == {str(FOLDER / "kernels.py")!r}
found = importlib.util.find_spec("kernels")
assert found is None or found.origin != {str(FOLDER / "kernels.py")!r}
assert importlib.util.find_spec("offmoe").origin == {str(FOLDER.parents[1] / "offmoe" / "__init__.py")!r}
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_python_without_torch_is_told_of_one_that_has_it() -> None:
    done = run(sys.executable, "-S", FOLDER / "quality.py")  # without its site-packages
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "has no torch or no transformers" in done.stderr
    assert f"use {FOLDER.parents[1] / '.venv' / 'bin' / 'python'}" in done.stderr

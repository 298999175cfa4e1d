"""The GPU kernels without a GPU: run in Triton's interpreter, compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU kernels need Triton")

ROOT = Path(__file__).resolve().parents[3]


def test_in_the_interpreter() -> None:
    """Contract tests of every format, in a process of their own (interpreted_triton.py says why)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, "tests/runtime/kernels/interpreted_triton.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout

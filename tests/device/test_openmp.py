"""Threads of OpenMP go when the thread that they help gives them up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, torch
from offmoe.device.openmp import release_threads
torch.set_num_threads(3)
product = torch.ones(512, 512) @ torch.ones(512, 512)
before = len(os.listdir("/proc/self/task"))
release_threads()
after = len(os.listdir("/proc/self/task"))
again = torch.ones(512, 512) @ torch.ones(512, 512)
print(before - after, torch.equal(product, again), torch.get_num_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_helpers_end_and_come_again() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    ended, equal, threads = done.stdout.split()
    assert int(ended) == 2
    assert (equal, threads) == ("True", "3")

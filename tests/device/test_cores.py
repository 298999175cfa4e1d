"""The cores that threads are started for: affinity, hyper-threads and quotas."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offmoe.device.cores import usable_cores, usable_cpus

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")


def machine(root: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        topology = root / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")
    return root


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    cpus: set[int] = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    return cpus


@pytest.mark.parametrize(
    ("cpus", "cores"), [({0, 1, 2, 3}, 2), ({0, 2}, 1), ({1}, 1), ({0, 1}, 2)], ids=["all", "one core", "one", "two"]
)
def test_hyper_threads_of_a_core_count_once(tmp_path: Path, allowed: set[int], cpus: set[int], cores: int) -> None:
    allowed |= cpus
    root = machine(tmp_path / "cpus", {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert usable_cores(root, tmp_path) == cores
    assert usable_cpus() == len(cpus)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "nonsense"}, 4),
        ({}, 4),
    ],
)
def test_a_quota_bounds_the_cores(tmp_path: Path, allowed: set[int], files: dict[str, str], cores: int) -> None:
    allowed |= {0, 1, 2, 3}
    root = machine(tmp_path / "cpus", {cpu: str(cpu) for cpu in range(4)})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cores(root, tmp_path) == cores


def test_without_topology_the_affinity_decides(tmp_path: Path, allowed: set[int]) -> None:
    allowed |= {0}
    assert usable_cores(tmp_path, tmp_path) == 1


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= usable_cpus()

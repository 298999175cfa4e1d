"""Memory cgroups, on folders that look like the kernel's: v1 beside v2, limits at several depths, none at all."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from offmoe.bench.memory_cap import MemoryCap
from offmoe.device import cgroup
from offmoe.device.cgroup import UNLIMITED, cgroup_free_bytes, memory_limit
from offmoe.errors import CapacityError

V1 = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "cache": "total_inactive_file"}
V2 = {"limit": "memory.max", "used": "memory.current", "cache": "inactive_file"}


def group(folder: Path, names: dict[str, str], limit: object, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        (names["limit"], limit),
        (names["used"], used),
        ("memory.stat", f"{names['cache']} {cache}\nanon 5"),
        ("cgroup.procs", ""),
    ):
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "of").write_text("4:cpu,memory:/box/inner\n0::/box/inner\n")
    return {"root": str(tmp_path / "fs"), "of_process": str(tmp_path / "of")}


def test_the_tightest_limit_counts_and_cache_is_free(tmp_path: Path, asked: dict[str, str]) -> None:
    group(tmp_path / "fs" / "memory" / "box" / "inner", V1, 2**63 - 4096, 10)
    group(tmp_path / "fs" / "memory" / "box", V1, 1000, 900, cache=300)
    assert cgroup_free_bytes(**asked) == 400
    assert memory_limit(**asked) == (1000, 1)
    group(tmp_path / "fs" / "box" / "inner", V2, 500, 450, cache=20)
    group(tmp_path / "fs" / "box", V2, "max", 10**6)
    assert cgroup_free_bytes(**asked) == 70
    assert memory_limit(**asked) == (500, 2)


def test_a_container_sees_its_own_as_the_root(tmp_path: Path, asked: dict[str, str]) -> None:
    group(tmp_path / "fs", V2, 800, 900)
    assert cgroup_free_bytes(**asked) == 0


def test_no_cgroups(tmp_path: Path) -> None:
    nowhere = {"root": str(tmp_path / "fs"), "of_process": str(tmp_path / "absent")}
    assert cgroup_free_bytes(**nowhere) == UNLIMITED
    assert memory_limit(**nowhere) is None
    with pytest.raises(CapacityError, match=r"no memory cgroups here.*systemd-run"):
        MemoryCap.create(1, "cap", **nowhere)


def test_one_of_our_own_is_made_where_it_can_be(tmp_path: Path, asked: dict[str, str], monkeypatch) -> None:
    """The inner one does not hand out memory (as v2 does not to a cgroup with processes); the one around it does."""
    inner = tmp_path / "fs" / "box" / "inner"
    group(inner, V2, "max", 0)
    group(inner.parent, V2, "max", 0)
    write = Path.write_text

    def refuse(path: Path, text: str) -> int:
        if path.parent.parent == inner:
            raise FileNotFoundError(2, "No such file or directory")
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    cap = MemoryCap.create(12345, "cap", **asked)
    folder = inner.parent / f"offmoe-{os.getpid()}-cap"
    assert (folder / "memory.max").read_text() == "12345"
    assert not list(inner.glob("offmoe-*"))
    cap.add(77)
    assert (folder / "cgroup.procs").read_text() == "77"
    assert (cap.peak_bytes, cap.kills) == (None, 0)
    write(folder / "memory.peak", "99\n")
    write(folder / "memory.events", "low 0\noom 2\noom_kill 1\n")
    assert (cap.peak_bytes, cap.kills) == (99, 1)


def test_what_ended_processes_left_is_removed(tmp_path: Path, asked: dict[str, str], monkeypatch) -> None:
    around = tmp_path / "fs" / "box" / "inner"
    group(around, V2, "max", 0)
    names = [f"offmoe-{os.getpid()}-mine", "offmoe-999999999-dead", "offmoe-full", "other-999999999-x"]
    for name in names:
        (around / name).mkdir()
    MemoryCap.create(1, "new", **asked)
    left = sorted(folder.name for folder in around.iterdir() if folder.is_dir())
    assert left == sorted([names[0], f"offmoe-{os.getpid()}-new", *names[2:]])


def test_the_kernel_may_take_a_moment_to_let_go(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "cap"
    folder.mkdir()
    rmdir, refusals = Path.rmdir, iter([OSError(errno.EBUSY, "Device or resource busy")] * 3)

    def busy(path: Path) -> None:
        if error := next(refusals, None):
            raise error
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", busy)
    with closing(MemoryCap(folder, cgroup.V2)):
        pass
    assert not folder.exists()


def test_here_if_this_machine_lets_us() -> None:
    try:
        cap = MemoryCap.create(64 << 20, "test")
    except CapacityError as error:
        pytest.skip(str(error))
    with closing(cap):
        assert cap.kills == 0
        assert cap.peak_bytes in (0, None)
    cap.close()
    around = cgroup.cgroups_around(cgroup.ROOT, cgroup.OF_PROCESS)
    assert not any(list(folder.glob(f"offmoe-{os.getpid()}-*")) for folder, _ in around)

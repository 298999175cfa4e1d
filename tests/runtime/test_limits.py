"""Memory limits as the kernel's files have them, and where there are none."""

from __future__ import annotations

import pytest

from offmoe.runtime.limits import UNLIMITED, cgroup_available
from offmoe.runtime.ram import share_out


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def available(tmp_path, membership):
    (tmp_path / "cgroup").write_text(membership)
    return cgroup_available(str(tmp_path / "sys"), str(tmp_path / "cgroup"))


def test_version_2_takes_the_tightest_of_the_groups_around(tmp_path):
    stat = "anon 100\ninactive_file 30"
    write(tmp_path / "sys/jobs", memory__max=1000, memory__current=400, memory__stat=stat)
    write(tmp_path / "sys/jobs/mine", memory__max="max", memory__current=300, memory__stat=stat)
    assert available(tmp_path, "0::/jobs/mine\n") == 630
    write(tmp_path / "sys/jobs/mine", memory__max=500, memory__current=300, memory__stat=stat)
    assert available(tmp_path, "0::/jobs/mine\n") == 230


def test_version_1_has_other_names(tmp_path):
    write(
        tmp_path / "sys/memory/box",
        memory__limit_in_bytes=2000,
        memory__usage_in_bytes=2500,
        memory__stat="total_inactive_file 700",
    )
    assert available(tmp_path, "5:cpu,memory:/box\n1:name=systemd:/other\n") == 200


def test_a_container_shows_its_own_group_as_the_root(tmp_path):
    write(tmp_path / "sys", memory__max=900, memory__current=100, memory__stat="inactive_file 0")
    assert available(tmp_path, "0::/\n") == 800


@pytest.mark.parametrize("files", [{}, {"memory__max": "what"}, {"memory__max": 100}])
def test_without_the_files_there_is_no_limit(tmp_path, files):
    write(tmp_path / "sys", **files)
    assert available(tmp_path, "0::/\n") == UNLIMITED
    assert cgroup_available(str(tmp_path / "nowhere"), str(tmp_path / "nothing")) == UNLIMITED


@pytest.mark.parametrize(
    ("slots", "wanted", "shares"),
    [
        (7, [8, 8, 8], (3, 2, 2)),
        (7, [0, 8, 2], (0, 5, 2)),
        (100, [3, 0, 5], (3, 0, 5)),
        (0, [4, 4], (0, 0)),
        (1, [4, 4], (1, 0)),
    ],
)
def test_slots_are_shared_out_equally(slots, wanted, shares):
    assert share_out(slots, wanted) == shares

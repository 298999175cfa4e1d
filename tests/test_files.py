"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offmoe.errors import ConfigError
from offmoe.files import check_folder, check_writable, replacing, temporary_path


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary == temporary_path(path)
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path, tmp_path / "file.partial") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), replacing(tmp_path / "no" / "file") as temporary:
        temporary.write_text("new")


def test_a_failed_flush_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("the disk is gone")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is gone"), replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    check_folder(tmp_path / "out.json", "-o")
    check_folder("out.json", "-o")
    with pytest.raises(ConfigError, match=r"^-o x: the folder '.*none' does not exist; create it first\.$"):
        check_folder(tmp_path / "none" / "out.json", "-o x")


@pytest.mark.parametrize(
    ("name", "says"), [("", "-o: the name of a file is missing"), (".", "is a folder"), ("d/", "is a folder")]
)
def test_what_names_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    with pytest.raises(ConfigError, match=says):
        check_folder(name, f"-o {name}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_device_or_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    check_folder(tmp_path / "file", "-o")
    for path in (tmp_path / "pipe", os.devnull):
        with pytest.raises(ConfigError, match=r"^-o is a device; give the name of a file\.$"):
            check_folder(path, "-o")


def test_a_folder_in_which_nothing_can_be_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "out", "-o")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"^-o x: cannot be written \(File name too long\); choose another path\.$"):
        check_writable(tmp_path / ("x" * 250), "-o x")
    with pytest.raises(ConfigError, match="is a folder"):
        check_writable(tmp_path, "-o")

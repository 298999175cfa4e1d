"""Writing a file whole or not at all, and where files may be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from offmoe.errors import ConfigError


def check_folder(path: str | os.PathLike[str], option: str) -> None:
    """Refuse a path that cannot be a file because of its folder or its name, before the work that it is to hold.

    Args:
        path: The file that will be written.
        option: The option that names it, as the message begins: "-o out.json".

    Raises:
        ConfigError: There is no such folder, or the path is a folder or a device itself, or empty.
    """
    if not os.fspath(path):
        raise ConfigError(f"{option.strip()}: the name of a file is missing.")
    if os.path.isdir(path):
        raise ConfigError(f"{option} is a folder; give the name of a file.")
    if os.path.exists(path) and not os.path.isfile(path):  # `replacing` would put a file in its place
        raise ConfigError(f"{option} is a device; give the name of a file.")
    folder = os.path.dirname(os.fspath(path)) or os.curdir
    if not os.path.isdir(folder):
        raise ConfigError(f"{option}: the folder {folder!r} does not exist; create it first.")


def check_writable(path: str | os.PathLike[str], option: str) -> None:
    """As `check_folder`; refuses a folder in which no file can be made as well, by making one.

    Raises:
        ConfigError: The path cannot be a file, or cannot be written.
    """
    check_folder(path, option)
    temporary = temporary_path(Path(path))
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise ConfigError(f"{option}: cannot be written ({error.strerror}); choose another path.") from error


def temporary_path(path: Path) -> Path:
    """Where this process writes the file before it gets its name: two processes may write one file at once."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


@contextmanager
def replacing(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[Path]:
    """Write a file so that its name never stands for half of it.

    The block writes a temporary file next to the final one. After the block its bytes are flushed to the disk and it
    takes the final name, in place of whatever had it. If the block fails, the temporary file is removed.

    Args:
        path: The final name.
        temporary: Another temporary name in the same folder, for callers that find leftovers of a killed run by it.
            Default: `temporary_path(path)`.

    Yields:
        The temporary path to write to.

    Raises:
        OSError: The file cannot be written, flushed or renamed.
    """
    path = Path(path)
    temporary = temporary or temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut. Only POSIX can open a folder, and not every file system syncs
    one.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

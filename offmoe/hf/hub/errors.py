"""What can go wrong on the way to the Hub, in words that say what to do.

Nothing moves. huggingface_hub tells the same mishap in several ways: a repository that is private, gated or absent,
a token that is wrong, a network that is not there. This is the one place that knows its exceptions. Must never let one
of them through, nor name a cause that it only guesses.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from offmoe.errors import CapacityError, CheckpointError, ConfigError, MissingTensorError, OffmoeError


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Whatever huggingface_hub raises in the block about model `name` leaves it as an error of ours."""
    try:
        yield
    except OffmoeError:
        raise
    except Exception as error:  # the Hub client's releases use different transports, each with errors of its own
        raise translated(error, name, revision, reached=True) from error


def translated(error: BaseException, name: str, revision: str | None, *, reached: bool) -> OffmoeError:
    """The error of ours that says what a user can do about one of huggingface_hub, of its transport or of the disk.

    reached: the Hub has answered before.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"model {name!r}"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return ConfigError(
            f"{what}: access is restricted; accept its terms at {constants.ENDPOINT}/{name}, and give a token of that "
            "account (`hf auth login`, or token=)"
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{what} has no revision {revision or 'main'!r}; use a branch, tag or commit that it has")
    if isinstance(error, DisabledRepoError):
        return ConfigError(f"{what}: the Hub has disabled this repository; use another copy of the model")
    if isinstance(error, LocalTokenNotFoundError):
        return ConfigError(f"{what}: token=True, but no token is stored here; run `hf auth login` or give the token")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return ConfigError(
            f"{what}: neither a folder here nor a repository on the Hub; check the name, and for a private one give a "
            "token (`hf auth login`, or token=)"
        )
    if status in (401, 403):
        return ConfigError(
            f"{what}: the Hub refuses the token ({status}); give one that is valid and may read the model "
            "(`hf auth login`, or token=)"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return ConfigError(
            f"{what}: not a folder here and not in the Hub cache, and HF_HUB_OFFLINE forbids the network; unset it, or "
            "give the path of a folder"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return ConfigError(
            f"{what}: not a folder here and not, or not all of it, in the Hub cache (local_files_only=True); give the "
            "path of a folder, or download the model once with a network"
        )
    if isinstance(error, EntryNotFoundError):
        return MissingTensorError(f"{what}: a file that its index names is not in the repository ({_line(error)})")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CapacityError(
            f"{what}: no room for the download in the Hub cache ({error.strerror}); make room, or give another "
            "cache_dir= (HF_HOME); shards that have arrived whole are kept"
        )
    if isinstance(error, PermissionError):
        return ConfigError(f"{what}: the Hub cache cannot be used ({_line(error)}); give another cache_dir= (HF_HOME)")
    if status is not None:
        return CheckpointError(f"{what}: the Hub answers with status {status}; try again later")
    if not reached:
        return ConfigError(
            f"{what}: not a folder here and not in the Hub cache, and the Hub cannot be reached ({_line(error)}); give "
            "the path of a folder, or download the model once with a network"
        )
    return CheckpointError(
        f"{what}: the download failed ({_line(error)}); try again, shards that have arrived whole are kept"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

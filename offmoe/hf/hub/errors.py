"""Turn whatever goes wrong on the way to the Hub into an error of offmoe that says what to do.

huggingface_hub reports one mishap in several ways: a repository that is private, gated or absent, a wrong token, a
network that is down. This is the only module that knows its exceptions. None of them leaves `hub_errors` as it is, and
no message names a cause that is only guessed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

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

from offmoe.errors import CapacityError, CheckpointError, ConfigError, MissingTensorError, OffmoeError

TOKEN = "(`hf auth login`, or token=)"
NOT_LOCAL = "not a folder here and not in the Hub cache"


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Translate whatever huggingface_hub raises in the block about model `name`."""
    try:
        yield
    except OffmoeError:
        raise
    except Exception as error:  # the Hub client's releases use different transports, each with errors of its own
        raise translated(error, name, revision, reached=True) from error


def translated(error: BaseException, name: str, revision: str | None, *, reached: bool) -> OffmoeError:
    """The error of offmoe for an error of huggingface_hub, of its transport or of the disk.

    Args:
        error: what was raised.
        name: the model's name.
        revision: the revision that was asked for; None means the default branch.
        reached: whether the Hub has answered an earlier request.
    """
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    what = f"model {name!r}"
    refusal = _refused(error, what, name, revision)
    if refusal is not None:
        return refusal
    if isinstance(error, LocalTokenNotFoundError):
        return ConfigError(f"{what}: token=True, but no token is stored here; run `hf auth login` or give the token")
    if isinstance(error, OfflineModeIsEnabled):
        return ConfigError(
            f"{what}: {NOT_LOCAL}, and HF_HUB_OFFLINE forbids the network; unset it, or give the path of a folder"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return ConfigError(
            f"{what}: not a folder here and not, or not all of it, in the Hub cache (local_files_only=True); give the "
            "path of a folder, or download the model once with a network"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CapacityError(
            f"{what}: no room for the download in the Hub cache ({error.strerror}); make room, or give another "
            "cache_dir= (HF_HOME); shards that have arrived whole are kept"
        )
    if isinstance(error, PermissionError):
        return ConfigError(f"{what}: the Hub cache cannot be used ({_line(error)}); give another cache_dir= (HF_HOME)")
    if not reached:
        return ConfigError(
            f"{what}: {NOT_LOCAL}, and the Hub cannot be reached ({_line(error)}); give the path of a folder, or "
            "download the model once with a network"
        )
    return CheckpointError(
        f"{what}: the download failed ({_line(error)}); try again, shards that have arrived whole are kept"
    )


def _refused(error: BaseException, what: str, name: str, revision: str | None) -> OffmoeError | None:
    """The error for an answer in which the Hub refuses something; None if it is no such answer."""
    if isinstance(error, GatedRepoError):
        return ConfigError(
            f"{what}: access is restricted; accept its terms at {constants.ENDPOINT}/{name}, and give a token of that "
            f"account {TOKEN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{what} has no revision {revision or 'main'!r}; use a branch, tag or commit that it has")
    if isinstance(error, DisabledRepoError):
        return ConfigError(f"{what}: the Hub has disabled this repository; use another copy of the model")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return ConfigError(
            f"{what}: neither a folder here nor a repository on the Hub; check the name, and for a private one give a "
            f"token {TOKEN}"
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return ConfigError(
            f"{what}: the Hub refuses the token ({status}); give one that is valid and may read the model {TOKEN}"
        )
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return MissingTensorError(f"{what}: a file that its index names is not in the repository ({_line(error)})")
    if status is not None:
        return CheckpointError(f"{what}: the Hub answers with status {status}; try again later")
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

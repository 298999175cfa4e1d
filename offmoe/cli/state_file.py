"""The file in which a verb keeps a model's state from one run to the next.

It stands in the user's cache folder, where each system says that this is, under a name made from the model, its
revision and its layout. A model that has changed since under the same name is told by the state's fingerprint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offmoe.errors import ConfigError
from offmoe.files import check_folder
from offmoe.state import begins_like_a_state

if TYPE_CHECKING:
    from offmoe.budget.inspect import Inspected


def user_cache_folder() -> Path:
    """The folder for files of this user's programs that can be made again.

    Linux: $XDG_CACHE_HOME, else ~/.cache. macOS: ~/Library/Caches. Windows: %LOCALAPPDATA%.
    """
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else home / ".cache"  # the standard ignores relative paths


def check_state(args: argparse.Namespace) -> None:
    """Refuse --state where it cannot be used, before anything is loaded.

    Raises:
        ConfigError: The path cannot be a file, or holds something that is no state and would be replaced; or --no-state
            is given as well.
    """
    if args.state is None:
        return
    if args.no_state:
        raise ConfigError("--state and --no-state are both given; use one of them.")
    check_folder(args.state, f"--state {args.state}")
    if not begins_like_a_state(args.state):
        raise ConfigError(f"--state {args.state} exists and is no state; choose another path, or remove it first.")


def state_file(args: argparse.Namespace, inspected: Inspected) -> Path | None:
    """The file that a command reads the state from, and keeps it in; None with --no-state."""
    if args.no_state:
        return None
    if args.state is not None:
        return Path(args.state)
    repository, shape = inspected.source.repository, inspected.shape
    model = str(inspected.source.model.resolve()) if repository is None else repository.name
    identity = json.dumps([model, args.revision, shape.experts, shape.top_k, shape.expert_bytes])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "-", Path(model).name if repository is None else model)
    return user_cache_folder() / "offmoe" / "state" / f"{name[-80:]}-{digest}.json"

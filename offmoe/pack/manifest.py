"""The manifest of a packed folder: which shards it will hold and which are finished, so that `offmoe pack` can resume.

A small JSON file, replaced after every shard. It refuses a folder that holds other files, and shards that came from
another model, other options or another version of offmoe.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from offmoe.errors import ConfigError
from offmoe.hf.load.config import CONFIG_FILE, PACK_MANIFEST
from offmoe.pack.quantizer import Loss
from offmoe.quant.packed_weight import WeightFormat
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.shard_writer import write_file

VERSION = 1
"""The version of the manifest's format."""


class Finished(NamedTuple):
    """A shard that is on the disk: its digest, and the loss of its experts by index of their MoE layer."""

    digest: str
    losses: dict[int, Loss]


@dataclass
class Manifest:
    """What a folder will hold, and which of its shards are finished.

    Args:
        path: the manifest's own file.
        plan: the model and the options that the folder is packed from; fixed.
        shards: the finished shards by file name.
        is_new: whether this run created the folder.
    """

    path: Path
    plan: dict[str, object]
    shards: dict[str, Finished]
    is_new: bool = False

    @classmethod
    def of(
        cls,
        folder: Path,
        checkpoint: Checkpoint,
        how: WeightFormat,
        shard_bytes: int,
        more: Mapping[str, object] = MappingProxyType({}),
    ) -> Manifest:
        """Read the manifest of a folder, or begin one in an empty folder.

        Args:
            folder: the folder to pack into; created if it does not exist.
            checkpoint: the model that is packed.
            how: the experts' format.
            shard_bytes: the most bytes of tensors in a shard.
            more: options that are not the default, which manifests of older versions do not name.

        Raises:
            ConfigError: the folder cannot be used, holds other files, or was packed from something else.
        """
        options = {"experts": how.kind, "group": how.group, "zero_points": how.zero_points, "shard_bytes": shard_bytes}
        plan = {
            "format": "offmoe-pack",
            "version": VERSION,
            "source": _identity(checkpoint),
            "options": {**options, **more},
        }
        path, is_new = folder / PACK_MANIFEST, not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            holds = sorted(os.listdir(folder))
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be used ({error.strerror}); give another folder") from error
        if holds:
            return cls(path, plan, _finished(folder, plan, holds[0]))
        manifest = cls(path, plan, {}, is_new)
        try:
            manifest.write()
        except BaseException:
            manifest.give_up()
            raise
        return manifest

    def losses(self, layers: int) -> list[Loss]:
        """The loss of each of the `layers` MoE layers, over all finished shards."""
        losses = [Loss()] * layers
        for _, shard in sorted(self.shards.items()):  # in one order, so that the sums are always the same
            for layer, loss in shard.losses.items():
                losses[layer] += loss
        return losses

    def write(self) -> None:
        """Replace the manifest's file. Raises what `write_file` raises."""
        shards = {
            file: {"digest": shard.digest, "layers": {str(n): astuple(loss) for n, loss in shard.losses.items()}}
            for file, shard in sorted(self.shards.items())
        }
        write_file(self.path, [json.dumps({**self.plan, "shards": shards}, indent=1).encode()])

    def give_up(self) -> None:
        """Remove the manifest, and a folder that this run created, if no shard is finished.

        Other files, such as those of a killed run, stay for the next run.
        """
        with suppress(OSError):
            if not self.shards and set(os.listdir(self.path.parent)) <= {self.path.name}:
                self.path.unlink(missing_ok=True)
                if self.is_new:
                    self.path.parent.rmdir()


def _finished(folder: Path, plan: dict[str, object], first: str) -> dict[str, Finished]:
    """The finished shards by the folder's manifest; ConfigError if it has none, or one of another plan.

    first: a file that the folder holds, for the message.
    """
    path, remedy = folder / PACK_MANIFEST, f"give an empty folder, or delete {folder} and pack again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shards = {
            str(file): Finished(str(shard["digest"]), {int(n): Loss(*v) for n, v in shard["layers"].items()})
            for file, shard in values["shards"].items()
        }
    except FileNotFoundError:
        raise ConfigError(f"{folder}: holds other files ({first}); {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a manifest of offmoe pack ({error!r}); {remedy}") from error
    different = [key for key in plan if values.get(key) != plan[key]]
    if different:
        reason = {
            "source": "from another model, or the model has changed since",
            "options": f"with other options ({values.get('options')})",
        }.get(different[0], "by another version of offmoe")
        raise ConfigError(f"{folder}: was packed {reason}; {remedy}")
    return shards


def _identity(checkpoint: Checkpoint) -> dict[str, object]:
    """What the model is recognized by when packing resumes. Its folder may have moved; its files must be the same."""
    config = (checkpoint.folder / CONFIG_FILE).read_bytes()
    files = {}
    for path in checkpoint.shards:
        status = path.stat()
        files[path.relative_to(checkpoint.folder).as_posix()] = [status.st_size, status.st_mtime_ns]
    return {"config": hashlib.blake2b(config, digest_size=16).hexdigest(), "shards": files}

"""What a packed folder is going to hold, and which of its shards are finished: so an interrupted `offmoe pack` goes on.

What moves: a small JSON file, written anew after every shard, all or nothing. Must never take a folder that holds
something else for its own, nor shards that were made of another model, with other options or by another version.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from offmoe.errors import ConfigError
from offmoe.hf.load.load import CONFIG_FILE, PACK_MANIFEST
from offmoe.pack.quantizer import Loss
from offmoe.quant.packed_weight import WeightFormat
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.shard_writer import write_file

VERSION = 1


class Finished(NamedTuple):
    """A shard that is on the disk; what its experts lost, by number of their layer."""

    digest: str
    losses: dict[int, Loss]


@dataclass
class Manifest:
    """What a folder is going to hold, and which shards are finished, by file name."""

    path: Path
    plan: dict[str, object]
    shards: dict[str, Finished]
    made_folder: bool = False

    @classmethod
    def of(cls, folder: Path, checkpoint: Checkpoint, how: WeightFormat, shard_bytes: int) -> Manifest:
        """That of a folder, begun if there is nothing yet; ConfigError if it is of something else than `checkpoint`."""
        options = {"experts": how.kind, "group": how.group, "zero_points": how.zero_points, "shard_bytes": shard_bytes}
        plan = {"format": "offmoe-pack", "version": VERSION, "source": _identity(checkpoint), "options": options}
        path, new = folder / PACK_MANIFEST, not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            holds = sorted(os.listdir(folder))
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be used ({error.strerror}); give another folder") from error
        if not holds:
            manifest = cls(path, plan, {}, new)
            try:
                manifest.write()
            except BaseException:
                manifest.give_up()
                raise
            return manifest
        remedy = f"give an empty folder, or delete {folder} and pack again"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            shards = {
                str(file): Finished(str(shard["digest"]), {int(n): Loss(*v) for n, v in shard["layers"].items()})
                for file, shard in found["shards"].items()
            }
        except FileNotFoundError:
            raise ConfigError(f"{folder}: holds other files ({holds[0]}); {remedy}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path}: not a manifest of offmoe pack ({error!r}); {remedy}") from error
        names = [key for key in plan if found.get(key) != plan[key]]
        if names:
            other = {
                "source": "from another model, or the model has changed since",
                "options": f"with other options ({found.get('options')})",
            }
            raise ConfigError(f"{folder}: was packed {other.get(names[0], 'by another version of offmoe')}; {remedy}")
        return cls(path, plan, shards)

    def write(self) -> None:
        """All or nothing; raises as `write_file`."""
        shards = {
            file: {"digest": shard.digest, "layers": {str(n): astuple(loss) for n, loss in shard.losses.items()}}
            for file, shard in sorted(self.shards.items())
        }
        write_file(self.path, [json.dumps({**self.plan, "shards": shards}, indent=1).encode()])

    def give_up(self) -> None:
        """Leave nothing where nothing is finished; what a killed run has left is for the next one."""
        with suppress(OSError):
            if not self.shards and set(os.listdir(self.path.parent)) <= {self.path.name}:
                self.path.unlink(missing_ok=True)
                if self.made_folder:
                    self.path.parent.rmdir()


def _identity(checkpoint: Checkpoint) -> dict[str, object]:
    """What tells this source from another, or from what it was before; not where it is."""
    config = (checkpoint.folder / CONFIG_FILE).read_bytes()
    files = {}
    for path in checkpoint.shards:
        status = path.stat()
        files[path.relative_to(checkpoint.folder).as_posix()] = [status.st_size, status.st_mtime_ns]
    return {"config": hashlib.blake2b(config, digest_size=16).hexdigest(), "shards": files}

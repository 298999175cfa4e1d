"""A fingerprint of a checkpoint, by a sample of its tensors: it tells fine-tunes of one model apart, wherever they are.

Moves: at most 128 KiB of dense weights.
Bound: 32 small reads, some ms on a cold disk.
Must never: depend on the folder's name, on the time of a download, or on how the experts are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from offmoe.errors import CheckpointError
from offmoe.storage.checkpoint import Checkpoint

SAMPLES = 32
SAMPLE_BYTES = 4096


def fingerprint(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """A hexadecimal digest of some tensors' names, sizes and bytes.

    Args:
        checkpoint: All sampled shards are on this machine.
        names: The tensors to sample from; SAMPLES of them, evenly spaced by name, are read.

    Raises:
        CheckpointError: A shard cannot be read.
    """
    ordered = sorted(names)
    chosen = [ordered[i * len(ordered) // SAMPLES] for i in range(SAMPLES)] if len(ordered) > SAMPLES else ordered
    digest = hashlib.sha256()
    for name in chosen:
        info = checkpoint.info(name)
        path, nbytes = checkpoint.shards[info.shard], min(info.nbytes, SAMPLE_BYTES)
        try:
            with open(path, "rb") as file:
                file.seek(info.offset + (info.nbytes - nbytes) // 2)
                sample = file.read(nbytes)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check file and limits") from error
        digest.update(f"{name}\0{info.nbytes}\0".encode() + sample)
    return digest.hexdigest()[:32]

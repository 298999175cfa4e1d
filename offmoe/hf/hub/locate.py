"""Find a model: a folder, the demo, or a repository on the Hub, of which only what is needed is fetched, when it is.

What moves: configuration, index and tokenizer (a few MB) when a model is located; of each shard that is not here the
header, by a range request (64 KiB, 6 MB for the 96 GB of Mixtral); whole shards only when a model is to be loaded, and
only those that its index names. Bounded by the network. Cache, authentication, retries and progress bars are
huggingface_hub's own. Everything is taken from one commit, so that a push in between cannot mix two models.

What it must never do: fetch pickles, other formats or the same weights a second time (`original/`, `consolidated*`,
variants), download a weight before it is known that the model can run, or wait for ever for a dead network.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offmoe.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MissingTensorError,
    ShardChangedError,
    UnsupportedModelError,
)
from offmoe.hf.hub.errors import hub_errors, translated
from offmoe.storage.checkpoint import INDEX_FILE, PICKLES, SINGLE_FILE, Checkpoint, indexed_files
from offmoe.storage.header import ShardHead, header_end
from offmoe.text import format_size

__all__ = ["Repository", "Source", "locate", "resolve_folder"]

logger = logging.getLogger(__name__)

DEMO = "demo"
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Files of a model's folder: weights, index, configs, tokenizer."""
SMALL_FILES = tuple(pattern for pattern in MODEL_FILES if pattern != "*.safetensors")
JUNK = ("*/*", "consolidated*", "*[!s].index.json", "*.index.*.json")
"""Among SMALL_FILES: subfolders, the publisher's own format, indexes of other formats and of variants."""
TIMEOUT_S = 10.0
"""For an answer of the Hub; huggingface_hub's own default for downloads, but it has none for questions."""
HEAD_BYTES = 1 << 16
"""First piece of a shard: the header of nearly all shards is smaller (6 KB in Mixtral, 85 KB in DeepSeek-V3)."""
CONNECTIONS = 8
RETRIES = 2
"""Of a request for a header, 3 s in all."""


@dataclass(frozen=True)
class Repository:
    """One commit of a model on the Hub. files: names in it; None where the Hub was not, or could not be asked."""

    name: str
    commit: str
    options: dict[str, Any]
    """token and cache_dir, as huggingface_hub takes them."""
    files: tuple[str, ...] | None
    why_offline: str = ""


@dataclass(frozen=True)
class Source:
    """Where a model comes from. folder: holds configuration, index and tokenizer; shards of a repository may be absent.

    repository: None for a folder of the user's own.
    """

    folder: Path
    repository: Repository | None = None

    def checkpoint(self) -> Checkpoint:
        """The model's tensors by the headers of its shards, wherever these are. Raises what Checkpoint.open does."""
        if self.repository is None:
            return Checkpoint.open(self.folder)
        shards = self._shards(self.repository)
        absent = [name for name in shards if not (self.folder / name).exists()]
        if absent and self.repository.files is None:
            raise MissingTensorError(
                f"model {self.repository.name!r}: of its {len(shards)} shards the Hub cache lacks {len(absent)} "
                f"({absent[0]}), and {self.repository.why_offline}; run it once with a network, what is there is kept"
            )
        with hub_errors(self.repository.name), ThreadPoolExecutor(CONNECTIONS) as pool:
            heads = dict(zip(absent, pool.map(lambda name: _head(self, name), absent), strict=True))
        return Checkpoint.open(self.folder, heads)

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same checkpoint with all its shards here, downloaded if need be.

        Raises CapacityError if the disk is too small, ShardChangedError if what arrives is not what was announced.
        """
        absent = checkpoint.shards_absent
        if not absent:
            return checkpoint
        assert self.repository is not None, "only a repository has shards elsewhere"
        ends = {info.shard: 0 for info in checkpoint.tensors.values()}
        for info in checkpoint.tensors.values():
            ends[info.shard] = max(ends[info.shard], info.offset + info.nbytes)
        names = [path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.shards]
        needed, free = sum(ends[names.index(name)] for name in absent), shutil.disk_usage(self.folder).free
        if needed > free:
            raise CapacityError(
                f"model {self.repository.name!r}: {format_size(needed)} are to be downloaded to {self.folder}, "
                f"where {format_size(free)} are free; make room, or give another cache_dir= (HF_HOME)"
            )
        logger.info("%s: downloading %d shards, %s", self.repository.name, len(absent), format_size(needed))
        patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in absent]
        _snapshot(self.repository.name, self.repository.commit, self.repository.options, patterns, ())
        here = Checkpoint.open(self.folder)
        if here.shards_absent or (here.shards, here.tensors) != (checkpoint.shards, checkpoint.tensors):
            raise ShardChangedError(f"{self.folder}: the shards are not those that the Hub announced; load it again")
        return here

    def _shards(self, repository: Repository) -> list[str]:
        """File names, by the rules of Checkpoint.open; those of the repository count as if they were here."""
        files = repository.files if repository.files is not None else tuple(os.listdir(self.folder))
        if SINGLE_FILE in files:
            return [SINGLE_FILE]
        if INDEX_FILE in files:
            return indexed_files(self.folder)
        what = f"model {repository.name!r}"
        if any(name.endswith(".safetensors") and "/" not in name for name in files):
            raise MissingTensorError(
                f"{what}: has shards, but neither {SINGLE_FILE} nor {INDEX_FILE}, which says where each tensor is; "
                "use a repository or a revision= that has one"
            )
        pickles = [name for name in files if name.endswith(PICKLES)]
        if pickles:
            raise UnsupportedModelError(
                f"{what}: holds only pickled weights ({pickles[0]}), which offmoe never loads because a pickle can run "
                "code; use a revision= with safetensors (often 'refs/pr/1'), or convert it with save_pretrained of "
                "transformers"
            )
        if repository.files is None:
            raise MissingTensorError(
                f"{what}: the Hub cache has neither {SINGLE_FILE} nor {INDEX_FILE}, and {repository.why_offline}; run "
                "it once with a network"
            )
        raise MissingTensorError(f"{what}: the repository has no safetensors weights; give one that does")


def locate(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Source:
    """A model's source: a folder as it is, "demo" the one in the package, else a Hub id. No weight is downloaded.

    Where the Hub cannot be asked, or must not be, what its cache holds is taken. Raises ConfigError if the model is
    neither a folder nor in the cache nor on the Hub for this token, CheckpointError if it is a file.
    """
    name = os.fspath(model)
    if name == DEMO:
        return Source(Path(__file__).parents[2] / "demo" / "model")
    path = Path(os.path.expanduser(name))  # of os.path, because those of Path raise for names that no file can have
    if name and os.path.isdir(path):
        return Source(path)
    if name and os.path.exists(path):
        raise CheckpointError(f"{path}: a file, not a model; give the folder that holds config.json and the shards")
    if not isinstance(model, str) or not NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(f"model {name!r}: there is no such folder, and a Hub id looks like 'owner/name'")
    options = {"token": token, "cache_dir": None if cache_dir is None else os.fspath(cache_dir)}
    if local_files_only:
        return _cached(name, revision, options, "local_files_only forbids the network")
    return _on_hub(name, revision, options)


def resolve_folder(model: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder of a model with all that loading takes, downloaded if need be. hub: options of `locate`."""
    source = locate(model, **hub)
    if source.repository is not None:
        source.fetch(source.checkpoint())
    return source.folder


def _on_hub(name: str, revision: str | None, options: dict[str, Any]) -> Source:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S, token=options["token"])
    except RevisionNotFoundError as error:
        raise translated(error, name, revision, reached=True) from error
    except Exception as error:
        reason = translated(error, name, revision, reached=False)
        try:
            source = _cached(name, revision, options, "the Hub cannot be asked")
        except ConfigError:
            raise reason from error
        logger.warning("%s; using the copy in the Hub cache", reason)
        return source
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    if "config.json" not in files:
        raise UnsupportedModelError(
            f"model {name!r}: the repository has no config.json, so it is not a model of transformers; give one "
            "that is (not a GGUF, adapter or original-format repository)"
        )
    folder = _snapshot(name, revision, options, SMALL_FILES, JUNK)
    if folder.name != info.sha:
        raise CheckpointError(f"model {name!r}: it was pushed to just now; try again")
    return Source(folder, Repository(name, folder.name, options, files))


def _cached(name: str, revision: str | None, options: dict[str, Any], why: str) -> Source:
    folder = _snapshot(name, revision, options, SMALL_FILES, JUNK, local_files_only=True)
    return Source(folder, Repository(name, folder.name, options, files=None, why_offline=why))


def _snapshot(
    name: str,
    revision: str | None,
    options: dict[str, Any],
    wanted: Sequence[str],
    unwanted: Sequence[str],
    *,
    local_files_only: bool = False,
) -> Path:
    """The cache's folder of one commit, with the wanted files of it."""
    from huggingface_hub import snapshot_download

    with hub_errors(name, revision):
        folder = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
            **options,
        )
    return Path(folder)


def _head(source: Source, file: str) -> ShardHead:
    """The header of a shard on the Hub, and the shard's size."""
    assert source.repository is not None, "only a repository has shards elsewhere"
    path = source.folder / file
    data, size = _range(source.repository, file, 0, HEAD_BYTES)
    end = header_end(data, size, path)
    if end > len(data):
        data += _range(source.repository, file, len(data), end)[0]
    return ShardHead(data[:end], size)


def _range(repository: Repository, file: str, start: int, end: int) -> tuple[bytes, int]:
    """Bytes [start, end) of a file, fewer if it is shorter, and the size of the whole."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {
        **build_hf_headers(token=repository.options["token"]),
        "Range": f"bytes={start}-{end - 1}",
        "Accept-Encoding": "identity",  # a compressed answer has ranges of its own
    }
    url = hf_hub_url(repository.name, file, revision=repository.commit)
    with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT_S, max_retries=RETRIES) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # the whole file would follow
            raise CheckpointError(
                f"model {repository.name!r}: the server does not send parts of {file!r}; download the model with "
                "`hf download` and give the folder"
            )
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        data = b"".join(response.iter_bytes())
    if not size.isdecimal() or len(data) != min(end, int(size)) - start:
        raise CheckpointError(f"model {repository.name!r}: the server sent another part of {file!r}; try again")
    return data, int(size)

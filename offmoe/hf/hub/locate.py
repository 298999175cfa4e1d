"""Find a model: a folder, the demo in the package, or a repository on the Hub.

Locating a model on the Hub downloads its configuration, index and tokenizer, a few MB. Reading its checkpoint downloads
the header of each shard that is absent (remote_header.py): 6 MB for the 96 GB of Mixtral. Whole shards are downloaded
only by `fetch`, and only those that the index names. Cache, authentication, retries and progress bars are
huggingface_hub's own.

Everything comes from one commit, so that a push in between cannot mix two models. Pickles, other formats and second
copies of the weights (`original/`, `consolidated*`, variants) are never downloaded, nor is any weight before it is
known that the model can run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError

from offmoe.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MissingTensorError,
    ShardChangedError,
    UnsupportedModelError,
)
from offmoe.hf.hub.errors import hub_errors, translated
from offmoe.hf.hub.gguf_repo import Wanted, chosen_model, existing, gguf_at, gguf_in, split_tag
from offmoe.hf.hub.model_files import JUNK, SMALL_FILES
from offmoe.hf.hub.remote_header import TIMEOUT_S, read_remote_gguf, read_remote_head
from offmoe.storage.checkpoint import INDEX_FILE, PICKLES, SINGLE_FILE, Checkpoint, indexed_files
from offmoe.storage.gguf import MAGIC, GgufHead
from offmoe.storage.gguf_set import SUFFIX, part_names
from offmoe.storage.header import ShardHead
from offmoe.text import format_size

logger = logging.getLogger(__name__)

DEMO = "demo"
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
Head = TypeVar("Head", ShardHead, GgufHead)
CONNECTIONS = 8
"""Headers that are requested at the same time."""


@dataclass(frozen=True)
class Repository:
    """One commit of a model on the Hub."""

    name: str
    """The repository, "owner/name"."""
    commit: str
    options: dict[str, Any]
    """token and cache_dir, as huggingface_hub takes them."""
    files: tuple[str, ...] | None
    """Names of the files in the commit; None if the Hub was not asked or did not answer."""
    why_offline: str = ""
    """Why `files` is None, for messages."""
    subfolder: str = ""
    """The folder of the repository that holds the model."""

    def path(self, name: str) -> str:
        """The path in the repository of a file of the model."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    folder: Path
    """Holds configuration, index and tokenizer. Shards of a repository may be absent."""
    repository: Repository | None = None
    """None if the model is a folder of the user's own."""
    file: Path | None = None
    """The (first) file of a GGUF model; None if the model is the folder."""
    above: Path | None = None
    """The folder whose configuration and tokenizer count where `folder` has none: repositories keep those of all their
    GGUF models there, and each large model in a folder below."""

    @property
    def model(self) -> Path:
        """What the model is called: its folder, or its file."""
        return self.folder if self.file is None else self.file

    @property
    def beside(self) -> tuple[Path, ...]:
        """The folders that a configuration and a tokenizer are looked for in; the first one that has them counts."""
        return (self.folder,) if self.above is None else (self.folder, self.above)

    def has(self, file: str) -> bool:
        """Whether the model has a file of that name, on this machine or on the Hub."""
        on_hub = self.repository is not None and file in (self.repository.files or ())
        return on_hub or (self.folder / file).exists()

    def checkpoint(self) -> Checkpoint:
        """The model's tensors, from the headers of its shards on disk and on the Hub.

        Raises:
            OffmoeError: what `Checkpoint.open` raises, or what went wrong on the way to the Hub.
        """
        if self.file is not None:
            return Checkpoint.open_gguf(self.file, self._remote_gguf_heads())
        if self.repository is None:
            return Checkpoint.open(self.folder)
        shards = self._shards(self.repository)
        return Checkpoint.open(self.folder, self._remote_heads(self.repository, shards, read_remote_head))

    def _remote_gguf_heads(self) -> dict[str, GgufHead]:
        if self.repository is None or self.file is None:
            return {}
        return self._remote_heads(self.repository, part_names(self.file.name), read_remote_gguf)

    def _remote_heads(self, repository: Repository, names: Sequence[str], read: Callable[..., Head]) -> dict[str, Head]:
        """The headers of those of the model's files that are not on this machine, by name."""
        absent = [name for name in names if not (self.folder / name).exists()]
        if absent and repository.files is None:
            raise MissingTensorError(
                f"model {repository.name!r}: of its {len(names)} shards the Hub cache lacks {len(absent)} "
                f"({absent[0]}), and {repository.why_offline}; run it once with a network, what is there is kept"
            )
        name, commit, token = repository.name, repository.commit, repository.options["token"]

        def head(file: str) -> Head:
            return read(name, commit, token, repository.path(file), self.folder / file)

        with hub_errors(name), ThreadPoolExecutor(CONNECTIONS) as pool:
            return dict(zip(absent, pool.map(head, absent), strict=True))

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """Download the shards that are absent.

        Returns:
            The same checkpoint, with all its shards on disk.

        Raises:
            CapacityError: the disk is too small.
            ShardChangedError: the downloaded shards differ from the headers that were read before.
        """
        absent = checkpoint.shards_absent
        if not absent:
            return checkpoint
        assert self.repository is not None, "only a repository has shards elsewhere"
        ends = {info.shard: 0 for info in checkpoint.tensors.values()}
        for info in checkpoint.tensors.values():
            ends[info.shard] = max(ends[info.shard], info.offset + info.nbytes)
        names = [path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.shards]
        needed, free = sum(ends[names.index(name)] for name in absent), shutil.disk_usage(existing(self.folder)).free
        if needed > free:
            raise CapacityError(
                f"model {self.repository.name!r}: {format_size(needed)} are to be downloaded to {self.folder}, "
                f"where {format_size(free)} are free; make room, or give another cache_dir= (HF_HOME)"
            )
        logger.info("%s: downloading %d shards, %s", self.repository.name, len(absent), format_size(needed))
        patterns = [re.sub(r"([*?[])", r"[\1]", self.repository.path(name)) for name in absent]
        _snapshot(self.repository.name, self.repository.commit, patterns, (), **self.repository.options)
        local = Checkpoint.open(self.folder) if self.file is None else Checkpoint.open_gguf(self.file)
        if local.shards_absent or (local.shards, local.tensors) != (checkpoint.shards, checkpoint.tensors):
            raise ShardChangedError(f"{self.folder}: the shards are not those that the Hub announced; load it again")
        return local

    def _shards(self, repository: Repository) -> list[str]:
        """Names of the model's shards, by the rules of Checkpoint.open, whether or not they are on disk."""
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
    subfolder: str | None = None,
    force_download: bool = False,
    gguf_file: str | None = None,
) -> Source:
    """Find a model. No weight is downloaded.

    If the Hub does not answer, or must not be asked, the copy in the Hub cache is used.

    Args:
        model: a folder, a GGUF file, "demo" for the model in the package, or a Hub id "owner/name", which may end in
            the quantization of one of the repository's GGUF models: "owner/name:Q4_K_M".
        revision: branch, tag or commit on the Hub; None means the default branch.
        token: as huggingface_hub takes it.
        cache_dir: the Hub cache; None means huggingface_hub's own.
        local_files_only: use no network.
        subfolder: the folder below `model` that holds the files.
        force_download: asks to download files again that are in the Hub cache, which is refused. Means nothing for a
            folder of the user's own.
        gguf_file: the GGUF file that is meant, or any of its parts, where there are several; relative to the folder or
            repository. With a GGUF file as the model, that file or nothing.

    Raises:
        ConfigError: the model is no folder, not in the cache, and not on the Hub for this token; or the folder holds
            several GGUF models, or not the one that is meant.
        CheckpointError: `model` is a file, but no GGUF file.
        UnsupportedModelError: the repository has no config.json.
    """
    _check_text(revision=revision, subfolder=subfolder, gguf_file=gguf_file)
    name = os.fspath(model)
    if name == DEMO:
        if gguf_file is not None:
            raise ConfigError(f"gguf_file={gguf_file!r}: the demo is no GGUF model; leave it out.")
        return Source(Path(__file__).parents[2] / "demo" / "model")
    path = Path(os.path.expanduser(name))  # os.path: the methods of Path raise for names that no file can have
    inside = (subfolder or "").strip("/")
    if name and os.path.exists(path):
        return _on_disk(path, inside, gguf_file)
    name, tag = split_tag(name)
    if not isinstance(model, str) or not NAME.fullmatch(name) or name.startswith("."):
        if name.endswith(SUFFIX):
            raise ConfigError(f"model {name!r}: there is no such file; check the path, or complete the download")
        raise ConfigError(f"model {name!r}: there is no such folder, and a Hub id looks like 'owner/name'")
    if force_download:
        raise ConfigError(f"force_download: delete the copy first, then load it again: hf cache rm model/{name}")
    options = {"token": token, "cache_dir": None if cache_dir is None else os.fspath(cache_dir)}
    if local_files_only:
        return _cached(name, revision, inside, options, Wanted(tag, gguf_file), "local_files_only forbids the network")
    return _on_hub(name, revision, inside, options, Wanted(tag, gguf_file))


def _on_disk(path: Path, subfolder: str, gguf_file: str | None) -> Source:
    """The model in a folder of the user's own, or in a GGUF file."""
    if os.path.isdir(path):
        inside = path / subfolder
        if not os.path.isdir(inside):
            raise ConfigError(f"subfolder={subfolder!r}: {path} has no such folder.")
        file = gguf_in(inside, gguf_file)
        return Source(inside if file is None else file.parent, file=file)
    if path.suffix == SUFFIX:
        return Source(path.absolute().parent, file=gguf_at(path, gguf_file))
    raise CheckpointError(f"{path}: {_no_model(path)}")


def _no_model(path: Path) -> str:
    """Why a file that is not called .gguf is no model, and what to do."""
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
    except OSError:  # a folder's name with a slash behind it, or no permission
        is_gguf = False
    if is_gguf:
        return f"a GGUF file under another name; once its download is complete, give it one that ends in {SUFFIX}"
    return "a file, not a model; give the folder that holds config.json and the shards, or a .gguf file"


def _check_text(**options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, str | None):
            raise ConfigError(f"{name}={value!r} must be a text.")


def _on_hub(name: str, revision: str | None, subfolder: str, options: dict[str, Any], wanted: Wanted) -> Source:
    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S, token=options["token"])
    except RevisionNotFoundError as error:
        raise translated(error, name, revision, reached=True) from error
    except Exception as error:
        reason = translated(error, name, revision, reached=False)
        try:
            source = _cached(name, revision, subfolder, options, wanted, "the Hub cannot be asked")
        except ConfigError:
            raise reason from error
        logger.warning("%s; using the copy in the Hub cache", reason)
        return source
    start = f"{subfolder}/" if subfolder else ""
    every = [sibling.rfilename for sibling in info.siblings or ()]
    files = tuple(path.removeprefix(start) for path in every if path.startswith(start))
    gguf, above = chosen_model(name, files, wanted), None
    if gguf is not None and "/" in gguf:
        within, _, gguf = gguf.rpartition("/")
        files = tuple(path.removeprefix(f"{within}/") for path in files if path.startswith(f"{within}/"))
        above, subfolder = subfolder, f"{start}{within}"
    if gguf is None and "config.json" not in files:
        raise UnsupportedModelError(
            f"model {name!r}: the repository has no {start}config.json, so it is not a model of transformers; give one "
            "that is (not an adapter or original-format repository)"
        )
    folder = _small_files(name, revision, subfolder, options)
    if folder.name != info.sha:
        raise CheckpointError(f"model {name!r}: it was pushed to just now; try again")
    if above is not None:
        _small_files(name, folder.name, above, options)
    repository = Repository(name, folder.name, options, files, subfolder=subfolder)
    file = None if gguf is None else folder / subfolder / gguf
    return Source(folder / subfolder, repository, file, None if above is None else folder / above)


def _cached(
    name: str, revision: str | None, subfolder: str, options: dict[str, Any], wanted: Wanted, why: str
) -> Source:
    folder = _small_files(name, revision, subfolder, {"local_files_only": True, **options})
    if not (folder / subfolder).is_dir():
        raise ConfigError(f"model {name!r}: the Hub cache has no folder {subfolder!r} of it, and {why}")
    inside = folder / subfolder
    gguf = chosen_model(name, [path.relative_to(inside).as_posix() for path in inside.rglob("*")], wanted)
    file = None if gguf is None else inside / gguf
    if file is not None:
        subfolder = file.parent.relative_to(folder).as_posix().removeprefix(".")
    repository = Repository(name, folder.name, options, files=None, why_offline=why, subfolder=subfolder)
    above = None if file is None or file.parent == inside else inside
    return Source(folder / subfolder, repository, file, above)


def _small_files(name: str, revision: str | None, subfolder: str, options: dict[str, Any]) -> Path:
    """The folder of one commit in the Hub cache, with the model's files in it, except for its weights."""
    wanted, unwanted = ([f"{subfolder}/{p}" if subfolder else p for p in group] for group in (SMALL_FILES, JUNK))
    return _snapshot(name, revision, wanted, unwanted, **options)


def _snapshot(name: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str], **options: Any) -> Path:
    """The folder of one commit in the Hub cache, with the wanted files in it."""
    patterns: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": list(unwanted)}
    with hub_errors(name, revision):
        return Path(snapshot_download(name, revision=revision, **patterns, **options))

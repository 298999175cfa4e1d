"""A checkpoint with its experts as int4 or int8, written once: what `offmoe pack` does.

What moves: every tensor of the checkpoint, once, disk to disk; experts through the quantizer, one matrix at a time. A
few shards are made at once, so that one is read while another is quantized and a third is written, synced or read
back; memory is bounded by one matrix of each. Bound by the quantizer (some 300 MB/s of bf16 per core for int4), or by
the disk where there are many cores (tools/bench/pack.py says by which). Shards get their names when they are on the
disk and were read back; a manifest says which are finished, so that an interrupted run goes on where it was. Index and
config.json come last: without a config nobody takes the folder for a model.

What it must never do: write into another model's folder, take shards of another source for its own, or say less about
what quantizing lost than it knows: every matrix is decoded as it will be and compared with the original.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from offmoe.errors import CapacityError, ConfigError, UnsupportedModelError, out_of_memory
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.quant_config import quantization_method
from offmoe.hf.hub.locate import MODEL_FILES, locate
from offmoe.hf.load.load import CONFIG_FILE, PACK_MANIFEST, build_meta, model_class, read_config, require_index
from offmoe.pack.manifest import Finished, Manifest
from offmoe.pack.plan import Item, NewShard, check_loads, encode, plan_shards, quantization_config, raw_parts
from offmoe.pack.quantizer import Loss, Quantizer, quantizer
from offmoe.quant.packed_weight import INT8, WeightFormat, int4
from offmoe.storage.checkpoint import INDEX_FILE, Checkpoint
from offmoe.storage.shard_writer import digest_of, fill, octets, read_chunks, write_file
from offmoe.text import format_size

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHARD_BYTES = 1 << 29
"""Tensors of a shard; an interrupted run does AT_ONCE of them again at most."""
AT_ONCE = 3
"""Shards that are made at the same time."""
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Packed:
    """What was done. bytes_in: of the source's tensors; bytes_out: of all shards; kept: of these, finished earlier."""

    folder: Path
    bytes_in: int
    bytes_out: int
    seconds: float
    shards: int
    kept: int
    layers: dict[str, Loss]

    @property
    def max_error(self) -> float:
        """The largest |error| of any weight."""
        return max(loss.max_error for loss in self.layers.values())


def weight_format(experts: str, group: int | None = None, zero_points: bool = False) -> WeightFormat:
    """The format that options name; ConfigError for what cannot be."""
    if experts == "int4":
        return int4(DEFAULT_GROUP if group is None else group, zero_points)
    if experts != "int8":
        raise ConfigError(f"experts={experts!r} cannot be packed; use 'int4' or 'int8'")
    if group is not None or zero_points:
        raise ConfigError("int8 has one scale per row: leave group and zero points out, or use experts='int4'")
    return INT8


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    how: WeightFormat,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **hub: Any,
) -> Packed:
    """Write `model` with quantized experts to the folder `out`, which `from_pretrained` then loads.

    progress(done, total): bytes of the source; called from threads, one at a time. Raises UnsupportedModelError
    (quantized already, experts not stored one by one, other multiples), ConfigError (`out` holds something else),
    CapacityError (the disk is too small or full, or no memory for a matrix), CheckpointError (NaN or infinity) or
    TransferError (the disk failed). Shards that are finished are kept for the next run; where none is, nothing is left.
    """
    started = time.perf_counter()
    source = locate(model, **hub)
    folder = Path(os.path.expanduser(os.fspath(out))).absolute()
    _refuse_place(folder, source.folder)
    hf_config = read_config(source.folder)
    method = quantization_method(hf_config)
    if method is not None:
        raise UnsupportedModelError(
            f"{source.folder}: quantized by {method!r} already, and would only lose more; offmoe runs it as it is, "
            "or pack the bf16 checkpoint of the model"
        )
    checkpoint = source.checkpoint()
    require_index(checkpoint)
    meta = build_meta(hf_config, model_class(hf_config))
    catalog = build_catalog(checkpoint, meta)
    shards = plan_shards(catalog, meta, how, shard_bytes)
    quantization = quantization_config(catalog, meta, how)
    planned = check_loads(folder, shards, hf_config, quantization)
    checkpoint = source.fetch(checkpoint)
    job = _Job(folder, checkpoint, shards, tuple(layer.name for layer in catalog.layers), progress)
    manifest = Manifest.of(folder, checkpoint, how, shard_bytes)
    try:
        kept = job.finished(manifest)
        job.check_space(kept)
        job.write(manifest, kept)
    except BaseException:
        manifest.give_up()
        raise
    _write_rest(checkpoint.folder, folder, shards, quantization)
    assert Checkpoint.open(folder).tensors == planned.tensors
    losses = [Loss()] * len(job.layers)
    for shard in shards:
        for layer, loss in manifest.shards[shard.file].losses.items():
            losses[layer] += loss
    return Packed(
        folder,
        job.bytes_in,
        sum(shard.nbytes for shard in shards),
        time.perf_counter() - started,
        len(shards),
        len(kept),
        dict(zip(job.layers, losses, strict=True)),
    )


@dataclass
class _Job:
    """One run over the shards of a plan."""

    folder: Path
    checkpoint: Checkpoint
    shards: tuple[NewShard, ...]
    layers: tuple[str, ...]
    progress: Callable[[int, int], object]
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def bytes_in(self) -> int:
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    def finished(self, manifest: Manifest) -> frozenset[str]:
        """Files that an earlier run finished and that still are what it wrote."""
        kept = set()
        for shard in self.shards:
            found, path = manifest.shards.get(shard.file), self.folder / shard.file
            if found is not None and path.is_file() and digest_of(path) == found.digest:
                kept.add(shard.file)
                self._advance(shard.items)
        if kept:
            logger.info("%s: %d of %d shards are finished", self.folder, len(kept), len(self.shards))
        return frozenset(kept)

    def check_space(self, kept: frozenset[str]) -> None:
        """CapacityError unless the disk has room for what is still to be written."""
        needed = sum(shard.nbytes for shard in self.shards if shard.file not in kept)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CapacityError(
                f"{self.folder}: {format_size(needed)} are to be written, and {format_size(free)} are free; make room, "
                "or pack to another disk"
            )

    def write(self, manifest: Manifest, kept: frozenset[str]) -> None:
        todo = [shard for shard in self.shards if shard.file not in kept]
        # The pool is left first, and waits for its threads, which stop at their next piece.
        with quantizer() as quantize, ThreadPoolExecutor(AT_ONCE, "offmoe-pack") as pool:
            made = [pool.submit(self._write_one, shard, manifest, quantize) for shard in todo]
            try:
                for future in as_completed(made):
                    future.result()
            except BaseException:
                self._stop.set()
                for future in made:
                    future.cancel()
                raise

    def _write_one(self, shard: NewShard, manifest: Manifest, quantize: Quantizer) -> None:
        losses: dict[int, Loss] = {}
        try:
            digest = write_file(self.folder / shard.file, self._pieces(shard, losses, quantize))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            largest = _largest(shard)
            takes = f"takes {format_size(largest)} for one weight after the other and as much again" if largest else ""
            raise CapacityError(
                f"{self.folder / shard.file}: no memory to make it, which {takes or 'is only copied'}; end other "
                "programs and pack again, finished shards are kept"
            ) from error
        with self._lock:
            manifest.shards[shard.file] = Finished(digest, losses)
            manifest.write()
            logger.info("%s: written, %d of %d", self.folder / shard.file, len(manifest.shards), len(self.shards))

    def _pieces(self, shard: NewShard, losses: dict[int, Loss], quantize: Quantizer) -> Iterator[bytes | memoryview]:
        yield shard.head
        space = torch.empty(_largest(shard), dtype=torch.uint8)
        for item in shard.items:
            path, source = self.checkpoint.shards[item.source.shard], item.source
            if item.how is None or item.layer is None:
                yield from self._until_stopped(read_chunks(path, source.offset, source.nbytes))
            else:
                data = space[: source.nbytes]
                for _ in self._until_stopped(fill(path, source.offset, octets(data))):
                    pass
                weight = data.view(source.dtype).view(source.shape)
                tensors = encode(quantize(weight, item.how, f"{path}: {source.name}"))
                loss = quantize.loss(weight, item.how, raw_parts(item, tensors))
                losses[item.layer] = losses.get(item.layer, Loss()) + loss
                yield from map(octets, tensors)
            self._advance((item,))
        self.checkpoint.check_unchanged()

    def _until_stopped(self, steps: Iterator[T]) -> Iterator[T]:
        for step in steps:
            if self._stop.is_set():
                raise _Stopped
            yield step

    def _advance(self, items: tuple[Item, ...]) -> None:
        with self._lock:
            self.done += sum(item.source.nbytes for item in items)
            self.progress(self.done, self.bytes_in)


class _Stopped(Exception):
    """Another shard failed, or the user stopped: this one is given up."""


def _largest(shard: NewShard) -> int:
    """Bytes of the largest weight that is quantized."""
    return max((item.source.nbytes for item in shard.items if item.how), default=0)


def _refuse_place(folder: Path, source: Path) -> None:
    """ConfigError for an output that is the source, a part of it or around it, or no folder."""
    place, origin = folder.resolve(), source.resolve()
    if place == origin or origin in place.parents or place in origin.parents:
        raise ConfigError(f"{folder}: is the model's own folder, in it or around it; give a folder elsewhere")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; give a folder that is empty or not there yet")


def _write_rest(source: Path, folder: Path, shards: tuple[NewShard, ...], quantization: dict[str, object]) -> None:
    """Tokenizer and other small files, the index, and last what makes the folder a model."""
    for name in sorted(os.listdir(source)):
        ours = name in (CONFIG_FILE, PACK_MANIFEST) or name.endswith((".safetensors", ".index.json"))
        if not ours and any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES) and (source / name).is_file():
            write_file(folder / name, read_chunks(source / name, 0, (source / name).stat().st_size))
    index = {
        "metadata": {"total_size": sum(item.nbytes for shard in shards for item in shard.items)},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }
    write_file(folder / INDEX_FILE, [json.dumps(index, indent=1, sort_keys=True).encode()])
    values = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    values["quantization_config"] = quantization
    write_file(folder / CONFIG_FILE, [json.dumps(values, indent=2).encode()])

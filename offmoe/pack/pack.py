"""Writes a checkpoint with its experts as int4 or int8: what `offmoe pack` does.

Every tensor is read and written once, experts through the quantizer one matrix at a time. A few shards are in work at a
time, so that one is read while another is quantized and a third is written or read back; memory holds one matrix of
each. The quantizer sets the pace (about 300 MB/s of bf16 per core for int4), or the disk where there are many cores
(`tools/bench/pack.py` tells which). A shard gets its name once it is on the disk and was read back. A manifest lists
the finished shards, so an interrupted run resumes. Index and config.json are written last: a folder without a config is
no model yet. Every matrix is decoded from the tensors that are written, and compared with the original.
"""

from __future__ import annotations

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
from offmoe.hf.hub.locate import locate
from offmoe.hf.hub.model_files import side_files
from offmoe.hf.load.config import CONFIG_FILE, PACK_MANIFEST, build_meta, model_class, read_config
from offmoe.hf.load.load import require_index
from offmoe.pack.manifest import Finished, Manifest
from offmoe.pack.plan import Item, NewShard, check_loads, plan_shards, quantization_config
from offmoe.pack.quantizer import Loss, Quantizer, quantizer
from offmoe.quant.packed_weight import INT8, WeightFormat, int4
from offmoe.storage.checkpoint import INDEX_FILE, Checkpoint
from offmoe.storage.shard_writer import digest_of, fill, octets, read_chunks, write_file
from offmoe.text import format_size

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHARD_BYTES = 1 << 29
"""The most bytes of tensors in a shard. An interrupted run repeats at most AT_ONCE shards."""
ROWS, TILED = "rows", "tiles"
LAYOUTS = (ROWS, TILED)
"""How experts may stand on the disk."""
AT_ONCE = 3
"""Shards in work at the same time."""
DEFAULT_GROUP = 64
"""Inputs per scale of int4. Groups of 32 lose less and take 6 % more bytes; groups of 128 take 3 % less."""


@dataclass(frozen=True)
class Packed:
    """What `pack` did.

    Args:
        folder: the packed model.
        bytes_in: bytes of the dense checkpoint's tensors.
        bytes_out: bytes of all shards.
        seconds: how long this run took.
        shards: number of shards.
        kept: how many of them an earlier run had finished.
        layers: each MoE layer's loss, by the name of its experts module.
    """

    folder: Path
    bytes_in: int
    bytes_out: int
    seconds: float
    shards: int
    kept: int
    layers: dict[str, Loss]

    @property
    def max_error(self) -> float:
        """The largest |error| of any expert's weight."""
        return max(loss.max_error for loss in self.layers.values())


def weight_format(experts: str, group: int | None = None, zero_points: bool = False) -> WeightFormat:
    """The format that options name.

    Args:
        experts: "int4" or "int8".
        group: inputs per scale, int4 only; None: 64.
        zero_points: int4 with zero points.

    Raises:
        ConfigError: there is no such format.
    """
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
    layout: str = ROWS,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **hub: Any,
) -> Packed:
    """Write a model with quantized experts to a folder, which `from_pretrained` then loads.

    After an error the finished shards stay for the next run; if there are none, nothing stays.

    Args:
        model: a folder, a Hub id, or "demo".
        out: the folder to write; empty, absent, or one that an interrupted run began.
        how: the experts' format, from `weight_format`.
        layout: "rows": as compressed-tensors reads them; "tiles": as the CPU's kernels do, for offmoe alone.
        shard_bytes: the most bytes of tensors in a shard.
        progress: progress(done, total) in bytes of the dense checkpoint; called from several threads, one at a time.
        hub: options of the Hub: revision, token, cache_dir, local_files_only.

    Raises:
        UnsupportedModelError: the model is quantized already, its experts are not stored one by one, or the format
            cannot hold their shapes.
        ConfigError: `out` holds something else, or there is no such layout.
        CapacityError: the disk is too small or full, or there is no memory for one matrix.
        CheckpointError: an expert's weight holds NaN or infinity.
        TransferError: the disk failed.
    """
    started = time.perf_counter()
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r} does not exist; use {' or '.join(map(repr, LAYOUTS))}")
    source = locate(model, **hub)
    folder = Path(os.path.expanduser(os.fspath(out))).absolute()
    if source.file is not None:
        raise ConfigError(
            f"{source.model}: a GGUF file holds its experts packed already, and packing them anew would only lose "
            "more; offmoe runs the file as it is, or pack the model's safetensors checkpoint"
        )
    _refuse_place(folder, source.folder)
    hf_config = read_config(source.folder)
    if (method := quantization_method(hf_config)) is not None:
        raise UnsupportedModelError(
            f"{source.folder}: quantized by {method!r} already, and would only lose more; offmoe runs it as it is, "
            "or pack the bf16 checkpoint of the model"
        )
    checkpoint = source.checkpoint()
    require_index(checkpoint)
    meta = build_meta(hf_config, model_class(hf_config))
    catalog = build_catalog(checkpoint, meta)
    tiles = layout == TILED
    shards = plan_shards(catalog, meta, how, shard_bytes, tiles)
    quantization = quantization_config(catalog, meta, how, tiles)
    planned = check_loads(folder, shards, hf_config, quantization)
    checkpoint = source.fetch(checkpoint)
    job = _Job(folder, checkpoint, shards, tuple(layer.name for layer in catalog.layers), progress)
    manifest = Manifest.of(folder, checkpoint, how, shard_bytes, {} if layout == ROWS else {"layout": layout})
    kept = job.run(manifest)
    _write_rest(checkpoint.folder, folder, shards, quantization)
    assert Checkpoint.open(folder).tensors == planned.view.checkpoint.tensors
    losses = manifest.losses(len(job.layers))
    return Packed(
        folder,
        bytes_in=job.bytes_in,
        bytes_out=sum(shard.nbytes for shard in shards),
        seconds=time.perf_counter() - started,
        shards=len(shards),
        kept=len(kept),
        layers=dict(zip(job.layers, losses, strict=True)),
    )


@dataclass
class _Job:
    """One run over the shards of a plan. layers: names of the MoE layers, in the catalog's order."""

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

    def run(self, manifest: Manifest) -> frozenset[str]:
        """Write every shard that no earlier run finished; returns the files of those that one did."""
        try:
            kept = self.finished(manifest)
            self.check_space(kept)
            self.write(manifest, kept)
        except BaseException:
            manifest.give_up()
            raise
        return kept

    def finished(self, manifest: Manifest) -> frozenset[str]:
        """The shards that an earlier run finished and that have not changed since."""
        kept = set()
        for shard in self.shards:
            entry, path = manifest.shards.get(shard.file), self.folder / shard.file
            if entry is not None and path.is_file() and digest_of(path) == entry.digest:
                kept.add(shard.file)
                self._advance(shard.items)
        if kept:
            logger.info("%s: %d of %d shards are finished", self.folder, len(kept), len(self.shards))
        return frozenset(kept)

    def check_space(self, kept: frozenset[str]) -> None:
        """CapacityError unless the disk has room for the shards that are not finished."""
        needed = sum(shard.nbytes for shard in self.shards if shard.file not in kept)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise CapacityError(
                f"{self.folder}: {format_size(needed)} are to be written, and {format_size(free)} are free; make room, "
                "or pack to another disk"
            )

    def write(self, manifest: Manifest, kept: frozenset[str]) -> None:
        """Write the shards that are not in `kept`."""
        todo = [shard for shard in self.shards if shard.file not in kept]
        # Leaving the pool waits for its threads, which stop at their next piece; only then the quantizer is closed.
        with quantizer() as quantize, ThreadPoolExecutor(AT_ONCE, "offmoe-pack") as pool:
            futures = [pool.submit(self._write_one, shard, manifest, quantize) for shard in todo]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                for future in futures:
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
        """The bytes of a shard, in order; adds what its experts lose to `losses`."""
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
                tensors = item.encode(quantize(weight, item.how, f"{path}: {source.name}"))
                loss = quantize.loss(weight, item.how, item.decode(tensors))
                losses[item.layer] = losses.get(item.layer, Loss()) + loss
                yield from map(octets, tensors.values())
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
    """Another shard failed or the user interrupted the run, so this shard is abandoned."""


def _largest(shard: NewShard) -> int:
    """Bytes of the largest weight of a shard that is quantized."""
    return max((item.source.nbytes for item in shard.items if item.how), default=0)


def _refuse_place(folder: Path, source: Path) -> None:
    """ConfigError if the output is no folder, or is the model's own folder, inside it or around it."""
    place, origin = folder.resolve(), source.resolve()
    if place == origin or origin in place.parents or place in origin.parents:
        raise ConfigError(f"{folder}: is the model's own folder, in it or around it; give a folder elsewhere")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; give a folder that is empty or not there yet")


def _write_rest(source: Path, folder: Path, shards: tuple[NewShard, ...], quantization: dict[str, object]) -> None:
    """Copy tokenizer and other small files, write the index, and last config.json, which makes the folder a model."""
    for name in side_files(source):
        if name not in (CONFIG_FILE, PACK_MANIFEST) and not name.endswith(".index.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, read_chunks(source / name, 0, (source / name).stat().st_size))
    index = {
        "metadata": {"total_size": sum(item.nbytes for shard in shards for item in shard.items)},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }
    write_file(folder / INDEX_FILE, [json.dumps(index, indent=1, sort_keys=True).encode()])
    values = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    values["quantization_config"] = quantization
    write_file(folder / CONFIG_FILE, [json.dumps(values, indent=2).encode()])

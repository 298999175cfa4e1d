"""Measures decoding of a model of Mixtral's shape on a GPU, at several numbers of slots, against disk and link.

Per token, the experts that had no slot go from the disk over a pinned buffer to the device. The weights are random and
created by the script. Their routing is not that of a trained model: it chooses nearly random experts, so hit rates mean
nothing, but bytes per second do.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

import offmoe
from offmoe.device.backend import Backend
from offmoe.device.host_buffers import HostBuffers
from offmoe.device.select import select_backend
from offmoe.storage.checkpoint import Checkpoint
from tools.bench import read
from tools.bench.gpu_section import MIB, SPARE_BYTES, WRITE_BYTES_PER_S, Section, copy_gb_s, reads_directly
from tools.bench.synthetic import write_mixtral

SHAPES = ((4096, 14336), (2048, 7168), (1024, 3584), (256, 896))
"""Hidden and intermediate sizes; the first are Mixtral 8x7B's. The largest that disk, device and time allow is used."""
LAYERS, EXPERTS, TOP_K, VOCABULARY = 2, 8, 2, 4096


def decode(section: Section) -> None:
    """Decoding of a random model of Mixtral's shape, at several numbers of slots, against disk and link."""
    import transformers

    transformers.logging.disable_progress_bar()
    backend = select_backend(section.device)
    hidden, intermediate = _largest(section, backend)
    folder = section.work / "mixtral"
    began = time.perf_counter()
    write_mixtral(folder, hidden, intermediate, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, vocabulary=VOCABULARY)
    expert_bytes = 3 * 2 * hidden * intermediate
    section.note(
        hidden=hidden,
        intermediate=intermediate,
        layers=LAYERS,
        experts=EXPERTS,
        expert_mb=round(expert_bytes / 1e6, 1),
        write_s=round(time.perf_counter() - began, 1),
        routing="of random weights: not that of a trained model, so hit rates here are not real",
    )
    link = _link_gb_s(section)
    limit, how = _disk_gb_s(folder)
    section.note(link_gb_s=link, disk_gb_s=round(limit, 2), disk_gb_s_by=how)
    print(
        f"  {LAYERS} layers x {EXPERTS} experts of {expert_bytes / 1e6:.0f} MB; disk {limit:.2f}, link {link:.2f} GB/s"
    )
    print("  routing of random weights is not real: look at the bytes per second, not at the hit rates")
    print("  slots  prefetch   ms/token  hit rate  missed MB/token  h2d GB/s  share of the bound")
    rows: list[dict[str, Any]] = []
    resident_ms = 0.0
    for slots, prefetch in ((8, 0), (4, 0), (2, 0), (4, "auto")):
        if rows and section.left() < (2 if section.tiny else 12):
            section.skip(f"{slots} slots, prefetch {prefetch}: out of time")
            continue
        row = _decode_once(section, folder, slots, prefetch)
        row |= {"bound_ms": None, "share_of_bound": None}
        if slots == EXPERTS:  # nothing moves: this is what computing takes, and a part of the others' bound
            resident_ms = float(row["ms_per_token"])
        else:
            bound = max(row["disk_mb"] / limit, row["h2d_mb"] / link, resident_ms)
            row |= {"bound_ms": round(bound, 3), "share_of_bound": round(bound / row["ms_per_token"], 3)}
        rows.append(row)
        section.note(rows=rows)
        print(
            f"  {slots:5d}  {prefetch:>8}  {row['ms_per_token']:9.2f}  {row['hit_rate']:8.2f}  {row['h2d_mb']:15.1f}"
            f"  {row['h2d_gb_s']:8.2f}  {row['share_of_bound'] or '-':>18}"
        )


def _decode_once(section: Section, folder: Path, slots: int, prefetch: int | str) -> dict[str, Any]:
    """Sampled decoding from one token on, after some tokens of warm-up. Bytes are per token."""
    model: Any = offmoe.from_pretrained(
        folder, device=section.device, slots_per_layer=slots, prefetch=prefetch, max_context=512
    )
    ids = torch.tensor([[5]], device=section.device)

    def run(tokens: int, seed: int) -> float:
        torch.manual_seed(seed)
        section.wait()
        began = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        section.wait()
        return time.perf_counter() - began

    with model.offload:
        if slots == EXPERTS:  # a long prompt brings every expert in, so that nothing moves afterwards
            model(input_ids=torch.arange(256, device=section.device)[None])
        run(8, 0)
        per_token = run(4, 1) / 4
        tokens = 8 if section.tiny else int(max(8, min(128, section.left() / 6 / per_token)))
        model.offload.reset_stats()
        wall = run(tokens, 2)
        stats = model.offload.stats()
    return {
        "slots": slots,
        "prefetch": prefetch,
        "tokens": tokens,
        "ms_per_token": round(wall / tokens * 1e3, 3),
        "hit_rate": round(stats.hit_rate, 4),
        "misses_per_token": round(stats.misses / tokens, 2),
        "h2d_mb": round(stats.h2d_bytes / tokens / 1e6, 2),
        "disk_mb": round(stats.disk_bytes / tokens / 1e6, 2),
        "h2d_gb_s": round(stats.h2d_bytes / wall / 1e9, 3),
        "stall_ms": round(stats.stall_s / tokens * 1e3, 3),
    }


def _largest(section: Section, backend: Backend) -> tuple[int, int]:
    free_disk, free_device = shutil.disk_usage(section.work).free, backend.free_bytes()
    for hidden, intermediate in SHAPES:
        nbytes = LAYERS * EXPERTS * 6 * hidden * intermediate
        lacks = [
            what
            for what, short in (
                ("disk", free_disk < nbytes + SPARE_BYTES),
                ("device memory", backend.auto_bytes(free_device) < 1.2 * nbytes + 10**9),
                ("time", section.left() / 2.5 < nbytes / WRITE_BYTES_PER_S),
                ("a dry run", section.tiny),
            )
            if short
        ]
        if not lacks or (hidden, intermediate) == SHAPES[-1]:
            return hidden, intermediate
        section.skip(f"hidden {hidden}, intermediate {intermediate} ({nbytes / 1e9:.1f} GB): for {', '.join(lacks)}")
    raise AssertionError("SHAPES is empty")


def _disk_gb_s(folder: Path) -> tuple[float, str]:
    """Speed of the disk when the same files are read from end to end, cold; the better of two passes."""
    checkpoint = Checkpoint.open(folder)
    buffers = HostBuffers(read.THREADS, read.REQUEST_BYTES)
    rates = []
    how = "O_DIRECT from end to end" if reads_directly(folder) else "buffered from end to end: O_DIRECT is refused here"
    try:
        for _ in range(2):
            read.drop_cache(checkpoint)
            if how.startswith("O_DIRECT"):
                rates.append(read.files_in_order(checkpoint, buffers).rate)
            else:
                began = time.perf_counter()
                for path in checkpoint.shards:
                    with open(path, "rb", buffering=0) as file:
                        while file.readinto(buffers.memory(0)):
                            pass
                nbytes = sum(path.stat().st_size for path in checkpoint.shards)
                rates.append(nbytes / 1e9 / (time.perf_counter() - began))
    finally:
        buffers.close()
    return max(rates), how


def _link_gb_s(section: Section) -> float:
    source = torch.ones(8 * MIB, dtype=torch.uint8, pin_memory=True)
    return copy_gb_s(section, source, torch.empty(8 * MIB, dtype=torch.uint8, device=section.device))

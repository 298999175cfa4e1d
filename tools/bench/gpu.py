#!/usr/bin/env python3
"""The measurements of tools/gpu_check, one section per process: a section that breaks the device breaks only itself.

Bytes go from the disk to host buffers and from there to the device, and weights through the device's memory. Each is
measured alone; gpu_models.py and gpu_decode.py measure them together. A section writes each figure at once, into
WORK/SECTION.json and as a line of the file of results, so that a section that is stopped has reported something.
transformers is imported only where it is needed: otherwise each process would spend most of its time on that.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkout  # noqa: F401
import torch

import offmoe
from offmoe.device.host_buffers import HostBuffers
from offmoe.device.select import select_backend
from tools.bench import read
from tools.bench.gpu_decode import decode
from tools.bench.gpu_hooks import CudaHooks, Hooks
from tools.bench.gpu_kernels import kernels
from tools.bench.gpu_section import MIB, SPARE_BYTES, WRITE_BYTES_PER_S, Section, copy_gb_s, reads_directly

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "psutil", "typer", "rich", "pytest")


# --- sections


def machine(section: Section) -> None:
    """Report the device, driver, versions and limits."""
    versions = {name: _version(name) for name in PACKAGES}
    section.note(python=platform.python_version(), system=platform.platform(), cores=os.cpu_count(), versions=versions)
    section.note(cuda_build=torch.version.cuda)
    section.note(
        work_folder_free_gb=round(shutil.disk_usage(section.work).free / 1e9, 1), direct_io=reads_directly(section.work)
    )
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.gen.current,pcie.link.width.current"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        section.note(nvidia_smi=(done.stdout or done.stderr).strip().splitlines())
    backend = select_backend(section.device)  # raises where there is no such device
    section.note(device_free_gb=round(backend.free_bytes() / 1e9, 2), backend=str(backend.device))
    section.note(**section.hooks.about(backend.device))
    values = (torch.ones(4, device=backend.device) * 2).sum().item()
    assert values == 8, "the device computes nonsense"


def copies(section: Section) -> None:
    """Copies to the device, from pageable memory and from torch's own pinned memory."""
    rates: dict[str, dict[str, float]] = {}
    kinds = ("pageable", "pinned")
    for size in (1, 2) if section.tiny else (1, 8, 64, 256):
        if section.left() < 3:
            section.skip(f"{size} MiB and larger: out of time")
            break
        destination = torch.empty(size * MIB, dtype=torch.uint8, device=section.device)
        for kind in kinds:
            source = torch.ones(size * MIB, dtype=torch.uint8, pin_memory=kind == "pinned")
            rates.setdefault(kind, {})[str(size)] = round(copy_gb_s(section, source, destination), 2)
        print(f"  {size:4d} MiB  " + "  ".join(f"{kind} {rates[kind][str(size)]:7.2f} GB/s" for kind in kinds))
        section.note(gb_s=rates, link_gb_s=max(rates[kinds[-1]].values()))


def pinning(section: Section) -> None:
    """Check whether the staging buffers can be pinned, how long that takes, and how much faster copies are."""
    backend = select_backend(section.device)
    count, size = (2, MIB) if section.tiny else (4, 256 * MIB)
    spent: list[float] = []

    def timed_pin(address: int, nbytes: int) -> bool:
        began = time.perf_counter()
        done = backend.pin(address, nbytes)
        spent.append(time.perf_counter() - began)
        return done

    began = time.perf_counter()
    timed: Any = SimpleNamespace(pin=timed_pin, unpin=backend.unpin)
    buffers = HostBuffers(count, size, pinning=timed)
    mapped_s = time.perf_counter() - began - sum(spent)
    try:
        pinned = [buffers.pinned(i) for i in range(count)]
        section.note(registered=all(pinned), map_s_per_gb=round(mapped_s / (count * size / 1e9), 4))
        if any(pinned):
            section.note(register_s_per_gb=round(sum(spent) / (sum(pinned) * size / 1e9), 4))
        destination = torch.empty(size, dtype=torch.uint8, device=section.device)
        section.note(
            torch_says_pinned=buffers.tensor(0).is_pinned(),
            gb_s=round(copy_gb_s(section, buffers.tensor(0), destination), 2),
        )
        section.wait()
    finally:
        began = time.perf_counter()
        buffers.close()
        section.note(unregister_s=round(time.perf_counter() - began, 4))
    print("  " + "  ".join(f"{name} {value}" for name, value in section.found.items()))


def disk(section: Section) -> None:
    """Cold reads of whole experts against the disk's limit: a short tools/bench/read.py."""
    if not section.found.setdefault("direct_io", reads_directly(section.work)):
        section.note(hint="unbuffered reads are refused in the work folder: give --dir on a local disk")
    models = [read.SMALL, read.BIG]
    if section.tiny:
        models = [read.Model("5 MB", layers=1, experts=16, hidden=2048, ff=416)]
    limits: list[float] = []
    for model in models:
        name = "cold_ratio_" + model.name.replace(" ", "").lower()
        if shutil.disk_usage(section.work).free < model.nbytes + SPARE_BYTES:
            section.skip(f"{model.name} experts: no room for {model.nbytes / 1e9:.1f} GB in the work folder")
            continue
        if not section.tiny and section.left() < 5 + model.nbytes / WRITE_BYTES_PER_S:
            section.skip(f"{model.name} experts: {section.left():.0f} s are too few to write and read them")
            continue
        ratio, found = read.measure(model, section.work / name, 0 if section.tiny else min(8, section.left() / 3))
        limits += found
        section.note(**{name: round(ratio, 3), "limit_gb_s": round(statistics.median(limits), 3)})


def resident(section: Section) -> None:
    """Decoding of the demo with a slot for every expert: the cost of offmoe's steps against stock transformers."""
    import transformers

    from offmoe.hf.hub.locate import locate
    from tools.bench.overhead import PROMPT, seconds_per_token

    transformers.logging.disable_progress_bar()
    folder = locate("demo").folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = {k: v.to(section.device) for k, v in tokenizer(PROMPT, return_tensors="pt").items()}
    tokens, rounds = (2, 2) if section.tiny else (64, 7)
    models: dict[str, Any] = {}  # offmoe's has more attributes than its class
    for name in ("eager", "grouped_mm"):
        stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation=name)
        stock = stock.eval().to(section.device)
        try:
            seconds_per_token(stock, inputs, tokens)
            models[name] = stock
        except (RuntimeError, NotImplementedError) as error:  # a kernel that this device does not have
            section.skip(f"stock, {name}: {str(error).splitlines()[0][:100]}")
    numeric: dict[str, Any] = {"exactness": "numeric", "lag": 1}
    ours: dict[str, dict[str, Any]] = {"offmoe": {}, "alone": numeric, "captured": {**numeric, "cuda_graphs": "auto"}}
    for name, options in ours.items():
        models[name] = offmoe.from_pretrained("demo", device=section.device, slots_per_layer=8, **options)
    models["captured"].generation_config.cache_implementation = "static"
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        for name in ours:
            seconds_per_token(models[name], inputs, tokens)
        for i in range(rounds):
            if i > 1 and section.left() < 10:
                section.skip(f"rounds {i + 1} to {rounds}: out of time")
                break
            first = i % len(models)
            for name in list(models)[first:] + list(models)[:first]:
                times[name].append(seconds_per_token(models[name], inputs, tokens))
    finally:
        captured = models["captured"].offload.captured
        for name in ours:
            models[name].offload.close()
    layers = models["offmoe"].config.num_hidden_layers
    ms = {name: statistics.median(found) * 1e3 for name, found in times.items()}
    stocks = zip(*(found for name, found in times.items() if name not in ours), strict=True)
    more = [(mine - min(stock), mine / min(stock)) for stock, mine in zip(stocks, times["offmoe"], strict=True)]
    section.note(
        ms_per_token={name: round(value, 3) for name, value in ms.items()},
        tokens_per_s={name: round(1e3 / value, 1) for name, value in ms.items()},
        ratio_vs_stock=round(statistics.median(ratio for _, ratio in more), 3),
        overhead_us_per_layer=round(statistics.median(extra for extra, _ in more) * 1e6 / layers, 1),
        rounds=len(more),
        layers_by_graphs=0 if captured is None else captured.replays,
    )
    print("  " + "  ".join(f"{name} {value:.2f} ms/token" for name, value in ms.items()))
    print(
        f"  offmoe / faster stock {section.found['ratio_vs_stock']}, "
        f"{section.found['overhead_us_per_layer']} us more per layer"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def whole_models(name: str) -> Callable[[Section], None]:
    """A section of gpu_models.py, which imports transformers."""

    def section(given: Section) -> None:
        from tools.bench import gpu_models

        getattr(gpu_models, name)(given)

    return section


SECTIONS: dict[str, Callable[[Section], None]] = {
    **{s.__name__: s for s in (machine, copies, pinning, kernels, resident, decode, disk)},
    **{name: whole_models(name) for name in ("parity", "verify", "budget", "prefill", "soak")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cuda", help="a CUDA device; or late, the device of tests")
    parser.add_argument("--work", type=Path, required=True, help="an existing folder for files and results")
    parser.add_argument("--out", type=Path, required=True, help="append figures to this file, a line of JSON each")
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    is_dry = args.device == "late"
    hooks: Hooks = CudaHooks()
    if is_dry:
        from tests.late_device import dry_run

        hooks = dry_run.prepare()
        torch.set_num_threads(1)  # small matrices are faster so, and the machine may be busy
    section = Section(args.section, args.device, is_dry, args.work, time.monotonic() + args.seconds, hooks, args.out)
    error = None
    try:
        SECTIONS[args.section](section)
        if is_dry:
            assert not dry_run.races(), dry_run.races()[0]
    except (Exception, KeyboardInterrupt, SystemExit) as failure:  # whatever it is, it is this section's result
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    section.save(error)
    raise SystemExit(error is not None)


if __name__ == "__main__":
    main()

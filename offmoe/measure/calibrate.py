"""Measures what moving and computing one model's experts cost on this machine, for `simulate`, `tune` and `inspect`.

Experts are read in random order from the shards through staging buffers; on CUDA, staging buffers are copied to the
device. Computing is timed in the loaded model, with the routing fixed: once to experts that are in slots, once to no
expert at all. The difference is the cost of the experts, with everything that the runtime does around them; the rest is
the dense part. Nothing is derived from sizes alone, except `expert_us_landed`.

What is measured apart leaves out how reading and computing slow each other down, so tokens/s that are estimated from
these figures may be off by a tenth or more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel

from offmoe.api import load
from offmoe.budget.inspect import Inspected
from offmoe.device.backend import CpuBackend
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.load.attach import reroute
from offmoe.io_limits import last_share
from offmoe.measure.probes import DiskProbe, copy_gb_s, host_expert, host_expert_us, timed
from offmoe.profile import CostModel
from offmoe.storage.store import ExpertStore
from offmoe.trace.trace import NONE

FEW = 4
"""Tokens behind `expert_us_host_4`, which is named after this number."""
COPY_BYTES = 64 << 20
DISK_SHARE, COMPUTE_SHARE = 0.4, 0.4
"""Shares of the time budget for reading alone and for computing alone. The rest goes to both at once."""
LEAST_ROUNDS, MOST_LONE_READS, WINDOWS = 3, 100, 5
Progress = Callable[[str], None]


def calibrate(inspected: Inspected, seconds: float, progress: Progress = lambda stage: None) -> CostModel:
    """Measure the costs of a model.

    Args:
        inspected: the model, with prefetch 0: only resident experts are computed.
        seconds: time budget, without loading. Every figure is measured at least three times even if that takes longer.
        progress: called with the name of each stage before it begins.

    Returns:
        The costs. Figures that this machine or this model cannot have are None.
    """
    backend, catalog = inspected.backend, inspected.catalog
    linked = not backend.unified_memory
    progress("copying")
    ram = copy_gb_s(CpuBackend(), COPY_BYTES)
    link = copy_gb_s(backend, COPY_BYTES) if linked else None
    progress("computing on the host")
    layout = max((layer.layout for layer in catalog.layers), key=lambda layout: layout.nbytes)
    host, host_few = host_expert_us(layout, tokens=1), host_expert_us(layout, tokens=FEW)
    shards = inspected.checkpoint.shards
    with (
        closing(ExpertStore(shards, catalog.records)) as store,
        closing(DiskProbe(store, catalog.records, shards)) as disk,
    ):
        progress("reading experts")
        disk_gb_s, latency_s = _reading(disk, max(catalog.shape.expert_bytes), seconds * DISK_SHARE)
        progress("loading the dense part")
        model = load(inspected)
        with model.offload:
            progress("computing")
            fixed = FixedRouting(model, inspected)
            dense_s, experts_s = fixed.measure(seconds * COMPUTE_SHARE)
        progress("computing on the host beside " + ("copies" if linked else "reads"))
        rest = seconds * (1 - DISK_SHARE - COMPUTE_SHARE)
        host_overlapped = _host_overlapped(inspected, disk, host_expert(layout, 1), rest, link)
    expert_us = max(0.0, experts_s) / fixed.experts * 1e6
    return CostModel(
        disk_gb_s=_four_digits(disk_gb_s),
        expert_us_device=round(expert_us, 3),
        dense_us_per_token=round(dense_s * 1e6, 3),
        h2d_gb_s=None if link is None else _four_digits(link),
        read_latency_us=round(latency_s * 1e6, 1),
        ram_gb_s=_four_digits(ram),
        expert_us_host=None if host is None else round(host, 3),
        expert_us_host_4=None if host_few is None else round(host_few, 3),
        expert_us_host_overlapped=None if host_overlapped is None else round(host_overlapped * 1e6, 3),
        expert_us_landed=_landed_us(inspected, expert_us),
    )


class FixedRouting:
    """Passes of one token through a loaded model whose routing is fixed, so that nothing moves after the first pass.

    Where slots hold less than top_k experts of every layer, a token is routed to as many as they hold.
    """

    def __init__(self, model: PreTrainedModel, inspected: Inspected, *, decoding: bool = False):
        """decoding: run only the decoder of an encoder-decoder model."""
        self._model: Any = model
        self._backend = inspected.backend
        self._modules = [find_experts(model)[layer.name] for layer in inspected.catalog.layers]
        self._top_k = inspected.catalog.shape.top_k
        self._routed = _that_fit(inspected)
        """Experts of each layer that a token is routed to."""
        self._layers_seen: set[int] = set()
        is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._decoder_only = is_encoder_decoder and decoding
        self._encoder_too = is_encoder_decoder and not decoding

    @property
    def experts(self) -> int:
        """Experts that one token passes through, known after a pass. Text does not reach the experts for images."""
        return sum(self._routed[layer] for layer in self._layers_seen)

    @property
    def share(self) -> float:
        """Those experts as a share of the ones that a token passes through in use."""
        return self.experts / sum(self._top_k[layer] for layer in self._layers_seen)

    def measure(self, seconds: float) -> tuple[float, float]:
        """Time passes for about `seconds`.

        Returns:
            Median seconds of a pass without experts, and of what a pass with resident experts takes more.
        """
        without: list[float] = []
        more: list[float] = []
        for with_experts in (True, False):  # fill the slots, warm allocator and caches
            self._timed_pass(with_experts)
        deadline = time.perf_counter() + seconds
        while len(more) < LEAST_ROUNDS or time.perf_counter() < deadline:
            without.append(self._timed_pass(with_experts=False))
            more.append(self._timed_pass(with_experts=True) - without[-1])
        return statistics.median(without), statistics.median(more)

    def _timed_pass(self, with_experts: bool) -> float:
        """Seconds of one pass, with the first experts of every layer or with none."""
        with ExitStack() as stack:
            for layer, module in enumerate(self._modules):
                stack.callback(reroute(module, partial(self._route, with_experts, layer)))
            inputs = self._inputs()
            done = self._backend.event()
            began = time.perf_counter()
            with torch.no_grad():
                self._model(**inputs, use_cache=False)
            done.record(self._backend.compute)
            done.synchronize()
            return time.perf_counter() - began

    def _route(self, with_experts: bool, layer: int, ids: torch.Tensor) -> torch.Tensor:
        self._layers_seen.add(layer)
        first = torch.arange(self._top_k[layer], dtype=ids.dtype, device=ids.device)  # [top_k]
        routed = first < (self._routed[layer] if with_experts else 0)
        return torch.where(routed, first, NONE).expand(len(ids), -1)

    def _inputs(self) -> Mapping[str, Any]:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self._backend.device)
        if self._decoder_only:
            with torch.no_grad():
                return {"encoder_outputs": self._model.get_encoder()(input_ids=ids), "decoder_input_ids": ids}
        return {"input_ids": ids, "decoder_input_ids": ids} if self._encoder_too else {"input_ids": ids}


def _that_fit(inspected: Inspected) -> tuple[int, ...]:
    """Experts of each layer, at most top_k, that stay resident together."""
    plan, shape = inspected.plan, inspected.catalog.shape
    quotas = tuple(map(min, shape.top_k, plan.slots_per_layer))
    if plan.scope == "model":
        ends = [min(end, sum(plan.slots_per_layer)) for end in accumulate(shape.top_k)]
        quotas = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    return quotas


def _landed_us(inspected: Inspected, expert_us: float) -> float | None:
    """Microseconds of computing left when all of an expert has landed; None where computing begins only then.

    torch on a CPU computes with the parts of a large, plain expert as they arrive (compute/compute.py). What is left at
    the end is the share of the expert that the readers bring last.
    """
    share = last_share(max(inspected.catalog.shape.expert_bytes))
    by_torch = any(layer.decode is None and layer.cpu_slot is None for layer in inspected.catalog.layers)
    early = share < 1 and by_torch and inspected.backend.unified_memory
    return round(expert_us * share, 3) if early else None


def _reading(disk: DiskProbe, expert_bytes: int, seconds: float) -> tuple[float, float]:
    """GB/s of all readers together, and the seconds that a lone read takes beyond its bytes at that rate."""
    lone: list[float] = []
    deadline = time.perf_counter() + seconds / 3
    while len(lone) < LEAST_ROUNDS or (time.perf_counter() < deadline and len(lone) < MOST_LONE_READS):
        lone.append(disk.lone_s())
    rate = statistics.median(disk.gb_s(seconds * 2 / 3 / WINDOWS) for _ in range(WINDOWS))
    return rate, max(0.0, statistics.median(lone) - expert_bytes / (rate * 1e9))


def _host_overlapped(
    inspected: Inspected, disk: DiskProbe, compute: Callable[[], None] | None, seconds: float, link: float | None
) -> float | None:
    """Median seconds of one expert on the CPU while the link is busy, or the disk on a device without a link.

    compute: computes the expert once; None if the CPU cannot. link: GB/s of the link when it is alone.
    """
    if compute is None:
        return None
    times: list[float] = []

    def step() -> None:
        times.append(timed(compute))

    if link is None:
        disk.gb_s(seconds, meanwhile=step)
        return statistics.median(times)
    rounds = max(LEAST_ROUNDS, int(seconds * link * 1e9 / COPY_BYTES))
    with ThreadPoolExecutor(1) as pool:
        copies = pool.submit(copy_gb_s, inspected.backend, COPY_BYTES, rounds)
        step()
        while not copies.done():
            step()
        copies.result()
    return statistics.median(times)


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")

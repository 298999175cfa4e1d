"""What moving and computing cost here with one model: the costs that `simulate`, `tune` and `inspect` price with.

What moves: experts at random, from the shards through the staging buffers, for as long as the caller gives; on CUDA
copies to the device. Computing is timed in the loaded model, with the routing fixed to experts that are in slots
and to none at all: the difference is the experts', with all that the runtime does around them; the rest is the dense
part. So nothing is estimated from sizes. Then it decodes with a routing that wanders, as real ones do, so that some of
what is asked for is missed, and the figures are corrected by what that took (correction.py). Bound: the seconds given,
after the dense part is loaded.

Must never leave the model that it measured open.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from offmoe.api import load
from offmoe.budget.inspect import Inspected
from offmoe.device.backend import CpuBackend
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.load.attach import reroute
from offmoe.io_limits import last_share
from offmoe.measure.probes import DiskProbe, copy_gb_s, host_expert, host_expert_us
from offmoe.profile import CostModel
from offmoe.simulate.fit_costs import TimedStep, corrected
from offmoe.storage.store import ExpertStore
from offmoe.trace.trace import NONE
from offmoe.types import CacheShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offmoe.handle import Offload

FEW = 4
"""Tokens of the second figure of an expert; the field of the profile is named after it."""
COPY_BYTES = 64 << 20
DISK_SHARE, COMPUTE_SHARE, RUN_SHARE = 0.2, 0.2, 0.35
"""Of the time: reading alone, computing alone, decoding with misses; the rest is for two at once and what lies between.
"""
LEAST_ROUNDS, MOST_LONE_READS, WINDOWS = 3, 100, 5
WANDERING_TOKENS, STAYING = 512, 0.5
"""Of the routing with misses: its length, and the chance of an expert to be asked again by the next token."""
Progress = Callable[[str], None]


def calibrate(inspected: Inspected, seconds: float, progress: Progress = lambda what: None) -> CostModel:
    """Measure for about `seconds`, loading apart; a few rounds of everything are always done.

    inspected: without prefetch, since only what is resident is computed with. progress: told what comes next.
    """
    backend, catalog = inspected.backend, inspected.catalog
    linked = not backend.unified_memory
    progress("copying")
    ram = copy_gb_s(CpuBackend(), COPY_BYTES)
    link = copy_gb_s(backend, COPY_BYTES) if linked else None
    progress("computing on the host")
    layout = max((layer.layout for layer in catalog.layers), key=lambda layout: layout.nbytes)
    host, host_few = host_expert_us(layout, tokens=1), host_expert_us(layout, tokens=FEW)
    store = ExpertStore(inspected.checkpoint.shards, catalog.records)
    try:
        with DiskProbe(store, catalog.records, inspected.checkpoint.shards) as disk:
            progress("reading experts")
            alone, latency_s = _reading(disk, max(catalog.shape.expert_bytes), seconds * DISK_SHARE)
            progress("loading the dense part")
            model = load(inspected)
            with cast("Offload", model.offload):
                steps = Steps(model, inspected)
                progress("computing")
                empty, extra = steps.measure(1, seconds * COMPUTE_SHARE / 2)
                _, extra_few = steps.measure(FEW, seconds * COMPUTE_SHARE / 2)
                progress("reading and computing at once")
                left = seconds * (1 - DISK_SHARE - COMPUTE_SHARE - RUN_SHARE) / (3 if linked else 2)
                with steps.resident(1) as step:
                    beside: list[float] = []
                    busy = disk.gb_s(left, meanwhile=lambda: beside.append(step()))
                    link_busy = None if link is None else _copying(inspected, step, left, link)
                progress("computing on the host beside " + ("copies" if linked else "reads"))
                host_beside = _host_beside(inspected, disk, host_expert(layout, 1), left, link)
                progress("decoding with misses")
                timed = steps.decode(seconds * RUN_SHARE)
                begins_early = cast("Offload", model.offload).begins_early
    finally:
        store.close()

    def expert_us(step_s: float) -> float:
        return round(max(0.0, step_s) / steps.experts * 1e6, 3)

    apart = CostModel(
        disk_gb_s=_figure(alone),
        expert_us_device=expert_us(extra),
        dense_us_per_token=round(empty * 1e6, 3),
        h2d_gb_s=None if link is None else _figure(link),
        read_latency_us=round(latency_s * 1e6, 1),
        ram_gb_s=_figure(ram),
        expert_us_device_4=expert_us(extra_few),
        expert_us_host=None if host is None else round(host, 3),
        disk_gb_s_overlapped=_figure(busy),
        h2d_gb_s_overlapped=None if link_busy is None else _figure(link_busy),
        expert_us_device_overlapped=expert_us(statistics.median(beside) - empty),
        expert_us_host_4=None if host_few is None else round(host_few, 3),
        expert_us_host_overlapped=None if host_beside is None else round(host_beside * 1e6, 3),
        expert_us_landed=expert_us(extra * last_share(max(catalog.shape.expert_bytes))) if begins_early else None,
    )
    return corrected(apart, catalog.shape, timed)


class Steps:
    """Forward passes of a loaded model over some tokens, with the routing fixed, so that nothing has to move.

    `experts`: how many a token meets on its way through a pass; known after one.
    """

    def __init__(self, model: PreTrainedModel, inspected: Inspected, *, decoding: bool = False):
        """decoding: of an encoder and a decoder, the decoder alone."""
        self._model: Any = model
        self._backend = inspected.backend
        self._modules = [find_experts(model)[layer.name] for layer in inspected.catalog.layers]
        self._shape = inspected.catalog.shape
        self._top_k = self._shape.top_k
        self._called: set[int] = set()
        both = bool(model.config.is_encoder_decoder)
        self._from_encoder, self._with_encoder = both and decoding, both and not decoding

    @property
    def experts(self) -> int:
        """Of the layers that passes have come through: text does not meet the experts for images."""
        return sum(self._top_k[layer] for layer in self._called)

    def measure(self, tokens: int, seconds: float) -> tuple[float, float]:
        """Median seconds of a pass without experts, and of what the same with experts in slots takes more."""
        without: list[float] = []
        more: list[float] = []
        for some in (True, False):  # slots filled, allocator and caches warm
            with self._routed(self._first if some else self._none, tokens) as step:
                step()
        deadline = time.perf_counter() + seconds
        while len(more) < LEAST_ROUNDS or time.perf_counter() < deadline:
            for some in (False, True):
                with self._routed(self._first if some else self._none, tokens) as step:
                    took = step()
                if some:
                    more.append(took - without[-1])
                else:
                    without.append(took)
        return statistics.median(without), statistics.median(more)

    @contextmanager
    def resident(self, tokens: int) -> Iterator[Callable[[], float]]:
        """What makes one pass with experts that are in slots, and gives its seconds."""
        with self._routed(self._first, tokens) as step:
            step()
            yield step

    def decode(self, seconds: float) -> tuple[TimedStep, ...]:
        """Steps of one token each, with experts of which some are missed; the first third of them does not count."""
        # On the device: a copy there would be waited for.
        drawn = torch.from_numpy(_wandering(self._shape)).to(self._backend.device)  # [tokens, layers, top_k]
        row = drawn[0]
        tokens = itertools.cycle(drawn)
        deadline, offload = time.perf_counter() + seconds, self._model.offload
        with self._routed(lambda layer: row[layer, : self._top_k[layer]], 1) as step:
            for end in (deadline - seconds * 2 / 3, deadline):
                offload.forget_times()
                for done in itertools.count():
                    if done >= LEAST_ROUNDS and time.perf_counter() >= end:
                        break
                    row = next(tokens)
                    step()
        found: tuple[TimedStep, ...] = offload.timed_steps()
        return found

    @contextmanager
    def _routed(self, choose: Callable[[int], torch.Tensor], tokens: int) -> Iterator[Callable[[], float]]:
        """What makes one pass, every token with the experts [top_k] that `choose` gives for a layer."""
        with ExitStack() as stack:
            for layer, module in enumerate(self._modules):
                stack.callback(reroute(module, partial(self._route, choose, layer)).remove)
            inputs = self._inputs(tokens)
            yield lambda: self._pass(inputs)

    def _route(self, choose: Callable[[int], torch.Tensor], layer: int, ids: torch.Tensor) -> torch.Tensor:
        self._called.add(layer)
        return choose(layer).to(ids.dtype).expand(len(ids), self._top_k[layer])

    def _first(self, layer: int) -> torch.Tensor:
        return torch.arange(self._top_k[layer], device=self._backend.device)

    def _none(self, layer: int) -> torch.Tensor:
        return torch.full_like(self._first(layer), NONE)

    def _inputs(self, tokens: int) -> dict[str, Any]:
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=self._backend.device)
        if self._from_encoder:
            with torch.no_grad():
                return {"encoder_outputs": self._model.get_encoder()(input_ids=ids), "decoder_input_ids": ids}
        return {"input_ids": ids, "decoder_input_ids": ids} if self._with_encoder else {"input_ids": ids}

    def _pass(self, inputs: Mapping[str, Any]) -> float:
        done = self._backend.event()
        began = time.perf_counter()
        with torch.no_grad():
            self._model(**inputs, use_cache=False)
        done.record(self._backend.compute)
        done.synchronize()
        return time.perf_counter() - began


def _wandering(shape: CacheShape) -> np.ndarray:
    """Ids [tokens, layers, top_k] of tokens that share some experts with the one before, the others drawn evenly."""
    chance = np.random.default_rng(0)
    ids = np.full((WANDERING_TOKENS, shape.layers, max(shape.top_k)), NONE, np.int64)
    for layer, (num_experts, top_k) in enumerate(zip(shape.experts, shape.top_k, strict=True)):
        worth = chance.random(num_experts)
        for token in range(WANDERING_TOKENS):
            worth = np.where(chance.random(num_experts) < STAYING, worth, chance.random(num_experts))
            ids[token, layer, :top_k] = np.sort(np.argpartition(-worth, top_k - 1)[:top_k])
    return ids


def _reading(disk: DiskProbe, expert_bytes: int, seconds: float) -> tuple[float, float]:
    """(GB/s of all readers, seconds that a lone read takes beyond its bytes at that rate)."""
    lone: list[float] = []
    deadline = time.perf_counter() + seconds / 3
    while len(lone) < LEAST_ROUNDS or (time.perf_counter() < deadline and len(lone) < MOST_LONE_READS):
        lone.append(disk.lone_s())
    rate = statistics.median(disk.gb_s(seconds * 2 / 3 / WINDOWS) for _ in range(WINDOWS))
    return rate, max(0.0, statistics.median(lone) - expert_bytes / (rate * 1e9))


def _host_beside(
    inspected: Inspected, disk: DiskProbe, compute: Callable[[], None] | None, seconds: float, link: float | None
) -> float | None:
    """Median seconds of an expert on the host while the link, or the disk where there is none, is busy."""
    if compute is None:
        return None
    times: list[float] = []

    def step() -> float:
        began = time.perf_counter()
        compute()
        times.append(time.perf_counter() - began)
        return times[-1]

    if link is None:
        disk.gb_s(seconds, meanwhile=step)
    else:
        _copying(inspected, step, seconds, link)
    return statistics.median(times)


def _copying(inspected: Inspected, step: Callable[[], float], seconds: float, alone: float) -> float:
    """GB/s of copies to the device while it computes."""
    rounds = max(LEAST_ROUNDS, int(seconds * alone * 1e9 / COPY_BYTES))
    with ThreadPoolExecutor(1) as pool:
        copies = pool.submit(copy_gb_s, inspected.backend, COPY_BYTES, rounds)
        while not copies.done():
            step()
        return copies.result()


def _figure(value: float) -> float:
    """Four digits, and never 0."""
    return float(f"{value:.4g}")

"""Predicts decoding speed from sizes and rates: in closed form, for machines that are here and for those that are not.

One token, one layer with k demands, of which m are missed:

    T(m) = D + max(R, F(m)) + C(m)

D is the layer's dense part, read from device memory, with its fixed overhead. R is the time of the resident experts, F
the time until the missed ones have arrived over disk and link, C what is computed afterwards. Where the host may
compute (`exactness="numeric"` beside a GPU), the m experts are divided between link and host so that T is least. The
chance of m follows from routing in which every expert is equally likely: hypergeometric for slots of each layer,
binomial for one pool. A recorded hit rate replaces it if a profile has one for these slots. T is averaged over m, not
computed at the average m, since a layer waits for its last expert. Dense layers outside the device add their bytes over
link or disk. The order of events is that of `simulate/clock.py`; `tests/budget/test_predict.py` holds both together.

Uniform routing is the worst case of real routing, and a token without misses is the best one, so both are given. What
is left out: prefetching, prompts, and the KV cache, which a short context makes small. The roofline itself is the
method of Williams, Waterman, Patterson, "Roofline", 2009. A prediction is not a measurement and is never shown as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import NamedTuple

from offmoe.budget.memory_plan import MemoryPlan
from offmoe.config import OffloadConfig
from offmoe.device.machines import Machine
from offmoe.io_limits import WHOLE_BYTES, last_share
from offmoe.profile import CostModel, MissCosts
from offmoe.simulate.decode_prices import (
    OPERATION_US,
    OPERATIONS_PER_LAUNCHED,
    OPERATIONS_PER_LAYER,
    OPERATIONS_PER_MOE_LAYER,
    OPERATIONS_PER_TOKEN,
)
from offmoe.types import DISK, CacheShape

OPERATIONS_PER_EXPERT = 8
"""Operations of torch of one expert, as `OPERATIONS_PER_LAYER` counts those of a layer."""
DECODE_BYTES = 20
"""Bytes of device memory that decoding one quantized weight moves, in a handful of passes: codes, int32 and floating
point intermediates, the result. Assumed."""
DECODE_NS = 2.0
"""Nanoseconds to decode one weight on a CPU: 27 ms for 2048 x 7168 in compressed-tensors int4 (docs/quantized.md)."""
READ_LATENCY_US = 100.0
"""Time of one read beyond its bytes, where it was not measured."""


class ExpertForm(NamedTuple):
    """What the time of a model's parts depends on besides the machine.

    Args:
        nbytes: the largest expert at rest.
        weights: weights of one expert.
        by_kernels: whether kernels of offmoe compute it from the bytes at rest.
        is_decoded: whether it is quantized and decoded first.
        itemsize: bytes of a weight once it is decoded.
        dense_bytes: dense weights that every token reads.
        layers: decoder layers.
        moe_layers: those of them that have experts.
        dense_by_kernels: whether kernels of offmoe read the dense weights too.
    """

    nbytes: int
    weights: float
    by_kernels: bool
    is_decoded: bool
    itemsize: int
    dense_bytes: int
    layers: int
    moe_layers: int
    dense_by_kernels: bool = False


@dataclass(frozen=True)
class Rates:
    """What a machine gives, whatever the model. GB are 10^9 bytes.

    Args:
        source: where the figures come from, in words.
        dense_gb_s: dense weights read by a product of torch with one row, on the device.
        torch_gb_s: the same of experts.
        kernel_gb_s: experts, and dense weights on a CPU, read by offmoe's own kernels.
        disk_gb_s: experts read from disk.
        link_gb_s: copies to the device; None if its memory is the host's.
        host_gb_s: weights read by the CPU's kernels beside a device; None without one.
        copy_gb_s: copies within RAM, into slots; None if unknown.
        decode_ns: decoding one quantized weight on the device, without kernels.
        operation_us: one operation of torch, Python included, when there is nothing to compute.
        assumed: what of these was assumed, in words.
    """

    source: str
    dense_gb_s: float
    torch_gb_s: float
    kernel_gb_s: float
    disk_gb_s: float
    link_gb_s: float | None = None
    host_gb_s: float | None = None
    copy_gb_s: float | None = None
    decode_ns: float = DECODE_NS
    operation_us: float = OPERATION_US
    assumed: tuple[str, ...] = ()

    @classmethod
    def of_machine(cls, machine: Machine) -> Rates:
        """The rates of a machine that is known by its name alone."""
        gpu, device = machine.gpu, machine.device_gb_s
        return cls(
            source=f"the data sheets of {machine.name}",
            dense_gb_s=device,
            torch_gb_s=device,
            kernel_gb_s=device,
            disk_gb_s=machine.disk_gb_s,
            link_gb_s=machine.link_gb_s,
            host_gb_s=None if gpu is None else machine.ram_gb_s,
            copy_gb_s=machine.ram_gb_s / 2 if gpu is None else None,  # a copy reads and writes
            decode_ns=DECODE_NS if gpu is None else DECODE_BYTES / device,
            assumed=machine.assumed,
        )

    def costs(self, form: ExpertForm) -> CostModel:
        """The costs of a model on this machine."""
        on_cpu = self.link_gb_s is None
        launched_together = form.by_kernels and not on_cpu
        overhead_us = (OPERATIONS_PER_LAUNCHED if launched_together else OPERATIONS_PER_EXPERT) * self.operation_us
        computing_us = form.nbytes / (self.kernel_gb_s if form.by_kernels else self.torch_gb_s) / 1e3
        if form.is_decoded and not form.by_kernels:
            decoded_us = form.weights * form.itemsize / self.torch_gb_s / 1e3
            computing_us = form.weights * self.decode_ns / 1e3 + decoded_us
        early = on_cpu and not form.by_kernels and not form.is_decoded
        dense_gb_s = self.kernel_gb_s if form.dense_by_kernels else self.dense_gb_s
        operations = OPERATIONS_PER_TOKEN + form.layers * OPERATIONS_PER_LAYER
        operations += form.moe_layers * OPERATIONS_PER_MOE_LAYER
        host_us = None
        if self.host_gb_s is not None:
            host_us = form.nbytes / self.host_gb_s / 1e3 + OPERATIONS_PER_EXPERT * self.operation_us
        return CostModel(
            disk_gb_s=self.disk_gb_s,
            expert_us_device=computing_us + overhead_us,
            dense_us_per_token=form.dense_bytes / dense_gb_s / 1e3 + operations * self.operation_us,
            h2d_gb_s=self.link_gb_s,
            read_latency_us=READ_LATENCY_US,
            ram_gb_s=self.copy_gb_s,
            expert_us_host=host_us,
            expert_us_landed=computing_us * last_share(form.nbytes) + overhead_us if early else None,
        )


def scaled(costs: CostModel, measured_bytes: int, nbytes: int) -> CostModel:
    """Measured costs for experts of another size: computing an expert takes time in proportion to its bytes."""
    ratio = nbytes / max(measured_bytes, 1)

    def times(value: float | None) -> float | None:
        return None if value is None else value * ratio

    return replace(
        costs,
        expert_us_device=costs.expert_us_device * ratio,
        expert_us_host=times(costs.expert_us_host),
        expert_us_host_4=times(costs.expert_us_host_4),
        expert_us_host_overlapped=times(costs.expert_us_host_overlapped),
        expert_us_landed=times(costs.expert_us_landed),
    )


@dataclass(frozen=True)
class Prediction:
    """A predicted decoding speed.

    Args:
        tokens_per_s: if every expert is equally likely, or at the recorded hit rate.
        most_tokens_per_s: if nothing is missed.
        hit_rate: the hit rate behind `tokens_per_s`.
        bound_by: what is busy longest: "device", "link", "disk" or "host".
    """

    tokens_per_s: float
    most_tokens_per_s: float
    hit_rate: float
    bound_by: str

    def to_dict(self) -> dict[str, object]:
        """The prediction for JSON; every key says that it is one."""
        return {
            "predicted_tokens_per_s": self.tokens_per_s,
            "predicted_most_tokens_per_s": self.most_tokens_per_s,
            "predicted_hit_rate": self.hit_rate,
            "predicted_bound_by": self.bound_by,
        }


class _Layer(NamedTuple):
    """What the time of one MoE layer depends on.

    Args:
        resident: share of its experts that have a slot.
        from_disk: share of its misses that are read from disk.
    """

    top_k: int
    experts: int
    nbytes: int
    resident: float
    from_disk: float


class _Work(NamedTuple):
    """Seconds that one token takes of each resource, and in all."""

    total: float
    device: float
    link: float = 0.0
    disk: float = 0.0
    host: float = 0.0


def predict(
    shape: CacheShape, config: OffloadConfig, plan: MemoryPlan, costs: CostModel, *, hit_rate: float | None = None
) -> Prediction:
    """Predict the decoding speed of a model.

    Args:
        shape: experts and top_k of each MoE layer.
        config: the options, resolved.
        plan: the division of memory.
        costs: of this model on the machine.
        hit_rate: a recorded one for these slots; None: every expert is equally likely.
    """
    layers = Counter(_layers(shape, config, plan))
    dense_s = costs.dense_us_per_token * 1e-6 / shape.layers
    host = None
    if config.miss_costs is not None:
        host = _Host(costs.miss_costs(max(shape.expert_bytes)), config.on_miss == "cpu", max(shape.expert_bytes))
    pooled = config.scope == "model"
    works, hits, least_s = [], 0.0, 0.0
    for layer, count in layers.items():
        chances = _chances(layer, pooled, hit_rate)
        hits += count * sum(p * (layer.top_k - m) for m, p in enumerate(chances))
        timed = [_layer_work(layer, m, dense_s, costs, host) for m in range(layer.top_k + 1)]
        works += [_Work(*(count * p * part for part in work)) for p, work in zip(chances, timed, strict=True)]
        least_s += count * timed[0].total
    streamed = _streaming(plan, costs)
    busy = _Work(*map(sum, zip(*works, streamed, strict=True)))
    resources = {name: getattr(busy, name) for name in ("device", "link", "disk", "host")}
    return Prediction(
        tokens_per_s=1 / max(busy.total, 1e-9),
        most_tokens_per_s=1 / max(least_s + streamed.total, 1e-9),
        hit_rate=hits / max(1, sum(shape.top_k)),
        bound_by=max(resources, key=lambda name: resources[name]),
    )


def _layers(shape: CacheShape, config: OffloadConfig, plan: MemoryPlan) -> list[_Layer]:
    """One entry per MoE layer. In a pool every expert of the model is as likely to be resident as any other."""
    slots, experts = plan.slots_per_layer, shape.experts
    ram = (0,) * shape.layers if plan.host is None else plan.host.slots_per_layer
    if config.scope == "model":
        slots, ram, experts = ((sum(each),) * shape.layers for each in (slots, ram, experts))
    layers = []
    for n, r, e, k, each in zip(slots, ram, experts, shape.top_k, shape.expert_bytes, strict=True):
        # What the device holds changes with every fetch, so that RAM's copies are of any experts; with on_miss="cpu" it
        # does not change, and RAM holds the others.
        in_ram = r / max(1, e - n) if config.on_miss == "cpu" else r / e
        layers.append(_Layer(min(k, e), e, each, min(1.0, n / e), 1.0 - min(1.0, in_ram)))
    return layers


def _chances(layer: _Layer, pooled: bool, hit_rate: float | None) -> Sequence[float]:
    """The chance of m misses, for m from 0 to top_k."""
    k, resident = layer.top_k, layer.resident
    if pooled or hit_rate is not None:  # independent: binomial
        miss = 1 - (resident if hit_rate is None else hit_rate)
        return [comb(k, m) * miss**m * (1 - miss) ** (k - m) for m in range(k + 1)]
    experts = layer.experts
    slots = round(resident * experts)
    return [comb(experts - slots, m) * comb(slots, k - m) / comb(experts, k) for m in range(k + 1)]


class _Host(NamedTuple):
    """What the host computes with beside a device.

    Args:
        costs: for experts of `largest` bytes.
        all_misses: whether it computes every miss; else it shares them with the device.
    """

    costs: MissCosts
    all_misses: bool
    largest: int


def _layer_work(layer: _Layer, missed: int, dense_s: float, costs: CostModel, host: _Host | None) -> _Work:
    """One layer with `missed` misses: the fastest division of them between link and host that is allowed."""
    allowed = range(1) if host is None else (missed,) if host.all_misses else range(missed + 1)
    ways = [_divided(layer, missed, on_host, dense_s, costs, host) for on_host in allowed]
    return min(ways, key=lambda work: work.total)


def _divided(layer: _Layer, missed: int, on_host: int, dense_s: float, costs: CostModel, host: _Host | None) -> _Work:
    """One layer, of whose misses the host computes `on_host` and the others travel into slots."""
    moved, nbytes = missed - on_host, layer.nbytes
    compute_s, request_s = costs.expert_us_device * 1e-6, costs.fetch_us * 1e-6
    if not missed:
        return _Work(dense_s + layer.top_k * compute_s, dense_s + layer.top_k * compute_s)
    from_disk = layer.from_disk
    read_s = nbytes / (costs.disk_gb_s * 1e9) + costs.read_latency_us * 1e-6
    link_s = 0.0 if costs.h2d_gb_s is None else nbytes / (costs.h2d_gb_s * 1e9)
    path_s = moved * (from_disk * max(read_s, link_s) + (1 - from_disk) * link_s) + on_host * from_disk * read_s
    arrived_s = path_s + (costs.landing_s(nbytes) * last_share(nbytes) if moved else 0.0)
    last_s = compute_s
    if nbytes > WHOLE_BYTES and costs.expert_us_landed is not None:  # computed in part before all of it has landed
        last_s = min(last_s, costs.expert_us_landed * 1e-6)
    device_s = (layer.top_k - on_host) * compute_s + moved * request_s
    host_s = 0.0
    if host is not None and on_host:
        scale = nbytes / host.largest
        computing = host.costs.host_s([1] * on_host, moved * link_s * 1e6, scale)
        last = on_host * from_disk * read_s + host.costs.host_us * scale * 1e-6 if from_disk else 0.0
        host_s = max(computing, last)
    least_s = layer.top_k * compute_s  # one thread asks host and device, so that dividing never beats all resident
    total_s = dense_s + max(least_s, device_s, arrived_s + (last_s if moved else 0.0), host_s)
    return _Work(total_s, dense_s + device_s, moved * link_s, missed * from_disk * read_s, host_s)


def _streaming(plan: MemoryPlan, costs: CostModel) -> _Work:
    """Dense layers that are not on the device, in every pass; nothing overlaps that."""
    nbytes = plan.offloaded
    if not nbytes:
        return _Work(0.0, 0.0)
    link_s = 0.0 if costs.h2d_gb_s is None else nbytes / (costs.h2d_gb_s * 1e9)
    disk_s = nbytes / (costs.disk_gb_s * 1e9) if plan.offloaded_in == DISK else 0.0
    return _Work(max(link_s, disk_s), 0.0, link_s, disk_s)

"""The places where `verify` puts a model's experts: what each set-up is, and the options that lead to it.

Each set-up brings one mechanism into play. Statistics tell whether the run has used it, since a set-up in which nothing
moved proves nothing. No set-up uses the state of an earlier run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from offmoe.config import OffloadConfig
from offmoe.policy.victims import NAMED
from offmoe.types import CacheShape, CacheStats

PREFETCH = 2
"""Experts to fetch before each layer asks. A number, since "auto" may decide in so short a run that none pays."""
POOL_PER_TOKEN = 2
"""Slots of the one pool, in experts of one token and layer."""


def always(stats: CacheStats) -> bool:
    """Nothing has to move in this set-up."""
    return True


@dataclass(frozen=True)
class SetUp:
    """One way to run the model.

    Args:
        name: as the table, JSON and `--only` have it.
        what: what is particular about it, in a few words.
        options: options of `OffloadConfig` in place of those that were asked for.
        moved: whether the statistics of a run show that its mechanism was used.
        smallest: whether it takes the smallest device_memory that works.
    """

    name: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    moved: Callable[[CacheStats], bool] = always
    smallest: bool = False

    @property
    def captures(self) -> bool:
        """Whether decoder layers are to run as graphs."""
        return self.options.get("cuda_graphs") == "auto"

    @property
    def is_numeric(self) -> bool:
        """Whether it sums in another order than stock transformers, by its own options."""
        return self.options.get("exactness") == "numeric"


NAMES = (
    "stock",
    "resident",
    "few-slots",
    "prefetch",
    "one-pool",
    "without-slots",
    "ram-tier",
    "smallest",
    "kernels",
    "kernels-few-slots",
    "host-computed",
    "without-host",
    "captured",
)
"""Every name of a set-up, in the order in which they run. "stock" is transformers without offmoe."""


def set_ups(config: OffloadConfig, shape: CacheShape, *, unified_memory: bool, numeric: bool = True) -> Iterator[SetUp]:
    """The set-ups of a model on a device, in the order in which they run.

    Args:
        config: the options as they were asked for.
        shape: the MoE layers.
        unified_memory: whether the device's memory is the host's.
        numeric: whether to add those with sums in another order, if `config` does not ask for such sums itself.
    """
    layers = list(zip(shape.experts, shape.top_k, strict=True))
    few = tuple(max(1, min(top_k, experts - 1)) for experts, top_k in layers)
    pool = shape.spread(POOL_PER_TOKEN * max(shape.top_k))
    quiet: dict[str, Any] = {"prefetch": 0, "on_miss": "fetch", "scope": "layer"}
    if not unified_memory:
        quiet["host_memory"] = 0
    short = {**quiet, "slots_per_layer": few}
    yield SetUp("resident", "every expert has a slot", {**quiet, "slots_per_layer": shape.experts})
    yield SetUp("few-slots", "as many slots per layer as a token needs", short, _missed)
    yield SetUp("prefetch", "experts are fetched before they are asked for", {**short, "prefetch": PREFETCH}, _ahead)
    yield SetUp("one-pool", "all layers share few slots", {**quiet, "scope": "model", "slots_per_layer": pool}, _missed)
    if unified_memory:
        yield SetUp("without-slots", "misses get no slot", {**short, "on_miss": "cpu"}, _without_slot)
    else:
        ram = {**short, "host_memory": config.host_memory}
        yield SetUp("ram-tier", "experts are copied from RAM", ram, _from_ram)
    least = {name: value for name, value in quiet.items() if name != "scope"}
    yield SetUp("smallest", "the smallest memory that works", {**least, "scope": "auto"}, _missed, smallest=True)
    if config.is_numeric:  # all of the above sum in another order already
        sums: dict[str, Any] = {}
    elif numeric:
        sums = {"exactness": "numeric"}
        everything = {**quiet, "slots_per_layer": shape.experts, **sums}
        yield SetUp("kernels", "kernels of offmoe; every expert has a slot", everything)
        yield SetUp("kernels-few-slots", "kernels of offmoe; few slots", {**short, **sums}, _missed)
    else:
        return
    if not unified_memory:
        yield SetUp("host-computed", "the host computes misses", {**short, **sums, "on_miss": "cpu"}, _without_slot)
        named = tuple(min(NAMED * top_k, experts) for experts, top_k in layers)
        alone = {**ram, **sums, "slots_per_layer": named, "lag": 1}
        yield SetUp("without-host", "steps of one token do not wait for the host", alone, _missed)
        graphs = {**alone, "cuda_graphs": "auto"}
        yield SetUp("captured", "decoder layers run as graphs, on a StaticCache", graphs, _missed)


def _missed(stats: CacheStats) -> bool:
    return stats.misses > 0


def _ahead(stats: CacheStats) -> bool:
    return stats.prefetched_used > 0


def _without_slot(stats: CacheStats) -> bool:
    return stats.host_computed > 0


def _from_ram(stats: CacheStats) -> bool:
    return stats.h2d_bytes > stats.disk_bytes

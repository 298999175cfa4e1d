"""The same layers with other numbers of slots: what stays is what the policies would evict last."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from offmoe.config import CacheOptions
from offmoe.policy.admission import build_admission
from offmoe.policy.host_tier import HostTier
from offmoe.policy.layer_cache import LayerCache
from offmoe.types import CacheShape, KeptSlots


def resize_layers(
    layers: Sequence[LayerCache], shape: CacheShape, before: CacheOptions, options: CacheOptions
) -> KeptSlots:
    """Give the layers of a model other numbers of slots.

    Args:
        layers: as `build_layers` made them.
        shape: of the model.
        before: the options that hold now.
        options: the new ones, with the same scope, eviction and prefetch.
    """
    assert (before.scope, before.eviction) == (options.scope, options.eviction)
    kept = KeptSlots({}, {})
    quotas = options.quotas(shape)
    pooled = options.scope == "model"
    for layer, end in enumerate([sum(quotas)] if pooled else list(accumulate(quotas))):
        slots = range(0 if pooled else end - quotas[layer], end)
        from_slot, evicted = layers[layer].residency.resize(slots)
        kept.on_device.update(from_slot)
        for cache in layers if pooled else (layers[layer],):
            for key in evicted:
                if cache.host_tier is not None and key in cache.keys:
                    cache.host_tier.on_evict(key)
    if before.on_miss != options.on_miss:
        admission = None
        for layer, cache in enumerate(layers):
            admission = admission if pooled and layer else build_admission(options.on_miss)
            cache.admission = admission
    host_quotas = options.host_quotas(shape)
    for cache, quota, end in zip(layers, host_quotas, accumulate(host_quotas), strict=True):
        slots = range(end - quota, end)
        if quota and cache.host_tier is None:
            cache.host_tier = HostTier(cache.keys, slots, cache.policy, cache.residency.slot_of)
        elif cache.host_tier is not None:
            kept.in_ram.update(cache.host_tier.resize(slots))
            if not quota:
                cache.host_tier = None
    return kept

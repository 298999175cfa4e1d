"""Resolves the options against a model's needs and what the machine has: what goes where, and what a miss does.

No option stays "auto" afterwards, except prefetch and on_miss, where "auto" is a policy that decides per access.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from offmoe.budget.device import plan_memory, plan_on_miss
from offmoe.budget.forward_pass import PassRoom
from offmoe.budget.host import plan_host
from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.needs import ModelNeeds
from offmoe.compute.kernels.library import status
from offmoe.config import OffloadConfig
from offmoe.device.backend import Backend
from offmoe.errors import CapacityError, ConfigError
from offmoe.policy.planner import SCRATCH_SLOTS
from offmoe.profile import MissCosts, Profile
from offmoe.types import HOST

logger = logging.getLogger(__name__)

BOUNDLESS = 1 << 60
"""Bytes of a device that any model fits."""


def check_config(config: OffloadConfig, backend: Backend) -> None:
    """Refuse options that the device cannot honor, before anything about the model is known.

    Raises:
        ConfigError: host_memory on a device whose memory is the host's, on_miss="cpu" where results would differ, or
            quantized dense weights where no kernels compute them.
    """
    if config.dense != "native" and (not backend.unified_memory or backend.has_device_kernels):
        raise ConfigError(
            f"dense={config.dense!r} on {backend.device}: only the CPU's kernels compute quantized dense "
            "weights. Leave it at 'native', or use device='cpu'."
        )
    if config.dense != "native" and status().library is None:
        raise ConfigError(f"dense={config.dense!r} needs the CPU's kernels: {status().message}.")
    if backend.unified_memory:
        if config.host_memory not in ("auto", 0):
            raise ConfigError(
                f"host_memory={config.host_memory!r}: this device's memory is the RAM. Leave it at 'auto', and set "
                "device_memory to cap what experts take of it."
            )
    elif config.on_miss == "cpu" and not config.is_numeric:
        raise ConfigError(
            f"on_miss='cpu' on {backend.device}: the CPU sums in another order than the device, so results would "
            "depend on what was cached. It takes exactness='numeric'; on_miss='fetch' is bitwise."
        )


def divide_or_refusal(
    config: OffloadConfig, needs: ModelNeeds, backend: Backend, free: int
) -> tuple[OffloadConfig, MemoryPlan, CapacityError | None]:
    """`divide`, and None. If nothing fits: the division for a device that is large enough, and the refusal."""
    try:
        return (*divide(config, needs, backend, free), None)
    except CapacityError as refusal:
        boundless = replace(config, device_memory=BOUNDLESS, host_memory="auto", slots_per_layer=None)
        return (*divide(boundless, needs, backend, BOUNDLESS), refusal)


def divide(
    config: OffloadConfig, needs: ModelNeeds, backend: Backend, free: int, *, host_held: int = 0
) -> tuple[OffloadConfig, MemoryPlan]:
    """Divide the memory. Slots that only a profile asks for and that do not fit are as many as fit.

    Args:
        config: the options.
        needs: what the model needs.
        backend: the device.
        free: bytes of the device's memory that are free.
        host_held: bytes of RAM that are not free because the model holds them already.

    Returns:
        The options with every "auto" resolved, and the plan.

    Raises:
        CapacityError: the model does not fit; the message names the smallest memory that works.
    """
    try:
        return _divide(config, needs, backend, free, host_held)
    except CapacityError:
        profile = config.profile
        if config.slots_per_layer is None or "slots_per_layer" in config.explicit or not isinstance(profile, Profile):
            raise
    logger.warning("the profile's slots_per_layer=%s do not fit: as many as fit are taken.", config.slots_per_layer)
    rest = {name: value for name, value in profile.cache.items() if name not in ("slots_per_layer", "scope")}
    scope = config.scope if "scope" in config.explicit else "auto"
    fewer = replace(config, slots_per_layer=None, scope=scope, profile=replace(profile, cache=rest))
    return _divide(fewer, needs, backend, free, host_held)


def _divide(
    config: OffloadConfig, needs: ModelNeeds, backend: Backend, free: int, host_held: int
) -> tuple[OffloadConfig, MemoryPlan]:
    """`divide` with the slots that the options ask for."""
    if config.prefill_chunk is not None and "prefill_chunk" in config.explicit:  # else it followed from another plan
        needs = needs.with_chunks(min(config.prefill_chunk, config.max_context or config.prefill_chunk))
    shape, experts, auto = needs.shape, needs.experts, backend.auto_bytes(free)
    host_free = 0 if backend.unified_memory else backend.host_free_bytes() + host_held
    host, host_computes = None, False
    if backend.unified_memory or not config.is_numeric:
        on_miss, plan = plan_on_miss(config, shape, needs.bytes, free=free, auto=auto, host_free=host_free)
        if on_miss != config.on_miss and plan.slots_per_layer != shape.experts:
            logger.info("on_miss=%r means %r here: choosing who gets a slot would not pay.", config.on_miss, on_miss)
    else:
        plan = plan_memory(config, shape, needs.bytes, free=free, auto=auto, host_free=host_free)
        on_miss = "fetch" if plan.slots_per_layer == shape.experts else config.on_miss
        host_computes = on_miss != "fetch"
    if not backend.unified_memory:
        host = plan_host(
            config,
            shape,
            plan.slots_per_layer,
            read_bytes=max(expert.read for expert in experts),
            scratch=SCRATCH_SLOTS * max(expert.slot for expert in experts) if host_computes else 0,
            free=host_free,
            taken=plan.offloaded if plan.offloaded_in == HOST else 0,
        )
    slots = plan.slots_per_layer
    resolved = config.resolved(
        device=str(backend.device),
        device_memory=plan.budget,
        scope=plan.scope,
        host_memory=0 if host is None else host.budget,
        host_slots=0 if host is None else host.slots_per_layer,
        slots_per_layer=slots[0] if len(set(slots)) == 1 else slots,
        max_context=plan.max_context,
        prefill_chunk=_prefill_chunk(config, needs, plan),
        on_miss=on_miss,
        miss_costs=miss_costs(config, max(shape.expert_bytes)) if host_computes else None,
        exactness="numeric" if config.is_numeric else "bitwise",
    )
    resolved.cache().check(shape)
    return resolved, replace(plan, host=host)


def pass_room(config: OffloadConfig, needs: ModelNeeds, plan: MemoryPlan) -> PassRoom:
    """What forward passes may take by the plan. config: the options, resolved or not."""
    return PassRoom(
        needs=needs.forward,
        workspace=plan.workspace - needs.temporary + plan.budget - plan.used,  # nothing else takes the rest
        kv_per_token=plan.kv // plan.max_context,
        max_context=plan.max_context,
        largest_chunk=config.prefill_chunk if "prefill_chunk" in config.explicit else None,
    )


def _prefill_chunk(config: OffloadConfig, needs: ModelNeeds, plan: MemoryPlan) -> int:
    """Most tokens of a prompt that pass at once: the option, else the longest prompt that fits whole."""
    if config.prefill_chunk is not None and "prefill_chunk" in config.explicit:
        return min(config.prefill_chunk, plan.max_context)
    return pass_room(config, needs, plan).longest_whole(needs.bytes.context_limit)


def miss_costs(config: OffloadConfig, expert_bytes: int) -> MissCosts:
    """What a miss costs by the profile, with defaults for whatever it lacks."""
    profile = config.profile
    if isinstance(profile, Profile) and profile.costs is not None:
        return profile.costs.miss_costs(expert_bytes)
    return MissCosts.assumed(expert_bytes)

"""What loading a model tells of its plan."""

from __future__ import annotations

import logging

import torch

from offmoe.budget.inspect import Inspected
from offmoe.text import format_size

logger = logging.getLogger(__name__)


def announce(inspected: Inspected) -> None:
    """Log the memory plan, and warn of what makes this model slow on this device."""
    plan = inspected.plan
    logger.info("%s on %s", plan.describe(), inspected.config.device)
    logger.info("a prompt of up to %d tokens is prefilled in one piece", inspected.config.prefill_chunk)
    if inspected.backend.emulates_bfloat16 and inspected.dtype == torch.bfloat16:
        logger.warning(
            "%s has no bfloat16 of its own: torch emulates it, with the same results and several times slower. "
            "dtype='float16' (--dtype float16) runs at full speed where the model's values stay below 65,504.",
            inspected.config.device,
        )
    if plan.offloaded_layers:
        logger.warning(
            "the dense part does not fit: %d decoder layers (%s) come from %s in every pass; device_memory=%d holds it",
            plan.offloaded_layers,
            format_size(plan.offloaded),
            plan.offloaded_in,
            plan.smallest_dense,
        )

"""Whether the device computes steps of one token without the host in its way, and if not, why."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from offmoe.compute.compute import ExpertCompute
from offmoe.compute.expert_layer import ExpertLayer, TokenOrder
from offmoe.compute.gpu_compute import RoutedForm, routed_forms
from offmoe.config import OffloadConfig
from offmoe.policy.victims import NAMED, NamedVictims
from offmoe.runtime.device_decode import DeviceDecode
from offmoe.runtime.device_tables import DeviceTables
from offmoe.transfer.engine import TransferEngine
from offmoe.types import CacheShape

logger = logging.getLogger(__name__)


def build_device_decode(
    config: OffloadConfig,
    shape: CacheShape,
    layers: Sequence[ExpertLayer],
    compute: ExpertCompute,
    transfer: TransferEngine,
    dtype: torch.dtype,
) -> DeviceDecode | None:
    """The runtime of steps of one token without the host; None where the host stays in the way. Loading says which.

    Args:
        config: the options, resolved.
        compute: of the layers.
        dtype: of their inputs.

    Raises:
        CapacityError: the system does not give the memory.
    """
    backend = transfer.writer.backend
    if not config.lag or backend.unified_memory:
        return None
    reason: str | None = None
    forms: Sequence[RoutedForm] = ()
    if not config.is_numeric:
        reason = "exactness='bitwise' takes torch's operators, which the host launches for each expert"
    elif not NamedVictims(config.cache(), shape).holds_everywhere:
        reason = f"a MoE layer has fewer than {NAMED} slots per expert of a token"
    elif any(layer.order is not TokenOrder.SORTED_IDS for layer in layers):
        reason = "the architecture adds up rows in its own way"
    else:
        found = routed_forms(layers, compute)
        forms, reason = ((), found) if isinstance(found, str) else (found, None)
    tables = DeviceTables(forms, shape, transfer, backend) if reason is None else None
    if tables is not None and not tables.is_mapped:
        tables.close()
        tables, reason = None, "the system does not pin memory"
    if tables is not None:
        try:
            tables.compile(dtype)
        except Exception as error:  # whatever a compiler, an assembler or a driver may raise for this device
            tables.close()
            tables, reason = None, f"its kernels do not compile here ({str(error).partition(chr(10))[0]})"
    if tables is None:
        logger.warning("lag=1: every MoE layer waits for the host all the same: %s", reason)
        return None
    logger.info("lag=1: steps of one token wait for the host only where an expert is not in RAM; untried on a GPU")
    return DeviceDecode(tables, transfer, backend)

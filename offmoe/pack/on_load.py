"""Quantizes experts while a model loads, as `experts="int4"` asks.

Sizes and offsets of the quantized tensors follow from the headers, so memory is planned before anything is written, and
nothing is written for a model that does not fit. `write` then quantizes into a temporary folder, which takes the packed
model's disk space and the quantizer's time at every load. The folder is removed with the model.
"""

from __future__ import annotations

import copy
import logging
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.errors import CapacityError, ConfigError, ShardChangedError, TransferError
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.catalog.quant_config import quantization_method
from offmoe.pack.pack import SHARD_BYTES, pack, weight_format
from offmoe.pack.plan import check_loads, plan_shards, quantization_config
from offmoe.quant.packed_weight import WeightFormat
from offmoe.storage.checkpoint import Checkpoint
from offmoe.text import format_size

logger = logging.getLogger(__name__)


class Written(NamedTuple):
    """A quantized checkpoint in a temporary folder, which its `cleanup` removes."""

    folder: tempfile.TemporaryDirectory[str]
    checkpoint: Checkpoint
    catalog: ExpertCatalog


def to_quantize(catalog: ExpertCatalog, config: PreTrainedConfig, experts: str) -> WeightFormat | None:
    """The format to quantize a checkpoint's experts to; None if they have it already.

    Args:
        catalog: the checkpoint's experts.
        config: its config.
        experts: "int4" or "int8".

    Raises:
        ConfigError: the experts are quantized in another format.
    """
    method = quantization_method(config)
    if catalog.view.checkpoint.gguf is not None:
        raise ConfigError(
            f"experts={experts!r}: {catalog.view.checkpoint.model} is a GGUF file, whose experts are "
            f"{' and '.join(catalog.formats) or 'not quantized'} and run as they are. Use experts='native', or the "
            "model's safetensors checkpoint."
        )
    if method is None:
        return weight_format(experts)
    if catalog.formats and all(name.endswith(f" {experts}") for name in catalog.formats):
        return None
    formats = " and ".join(catalog.formats) or "not quantized, but other weights are"
    raise ConfigError(
        f"experts={experts!r}: the experts of this checkpoint are {formats} ({method}), and quantizing what is "
        "quantized would only lose more. Use experts='native' (with exactness='numeric' for the CPU's kernels), or the "
        "bf16 checkpoint of the model."
    )


def with_experts(config: PreTrainedConfig, experts: str) -> PreTrainedConfig:
    """A copy of a config in which experts are quantized as `experts` asks, complete enough to tell sizes by.

    Returns `config` itself if `experts` is "native", or if the model is quantized already.
    """
    if experts == "native" or quantization_method(config) is not None:
        return config
    how = weight_format(experts)
    config = copy.deepcopy(config)
    weights = {"num_bits": how.bits, "group_size": how.group, "symmetric": not how.zero_points}
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }
    return config


def planned(
    catalog: ExpertCatalog, meta: PreTrainedModel, config: PreTrainedConfig, how: WeightFormat
) -> ExpertCatalog:
    """The catalog of the checkpoint once its experts are quantized; nothing is written.

    Raises:
        UnsupportedModelError: its experts cannot be packed.
    """
    shards = plan_shards(catalog, meta, how, SHARD_BYTES)
    return check_loads(catalog.view.folder, shards, config, quantization_config(catalog, meta, how))


def write(catalog: ExpertCatalog, source: Path, how: WeightFormat, name: str) -> Written:
    """Quantize a model into a temporary folder.

    Args:
        catalog: what `planned` gave.
        source: the model's folder.
        how: the experts' format.
        name: the model's name for messages.

    Raises:
        CapacityError: the disk has no room.
        ShardChangedError: the model changed after `planned` read its headers.
        OffmoeError: whatever else `pack` raises.
    """
    logger.warning(
        "%s: its experts are quantized now, and will be at every load; 'offmoe pack %s OUT --experts %s' does it once, "
        "and OUT then loads at once",
        name,
        name,
        how.kind,
    )
    try:
        folder = tempfile.TemporaryDirectory(prefix=f"offmoe-{how.kind}-")  # exists as long as the model
    except OSError as error:
        raise TransferError(
            f"experts={how.kind!r}: no temporary folder to quantize into ({error}); set TMPDIR to a folder on a disk "
            "with room"
        ) from error
    try:
        needed = sum(info.nbytes for info in catalog.view.checkpoint.tensors.values())
        free = shutil.disk_usage(folder.name).free
        if needed > free:
            raise CapacityError(
                f"experts={how.kind!r}: the quantized model takes {format_size(needed)}, and {format_size(free)} are "
                f"free in {tempfile.gettempdir()}; make room there, set TMPDIR to a folder on another "
                "disk, or quantize once to where there is room: "
                f"offmoe pack {shlex.quote(name)} OUT --experts {how.kind}"
            )
        out = Path(folder.name, "model")
        pack(source, out, how)
        checkpoint = Checkpoint.open(out)
        if checkpoint.tensors != catalog.view.checkpoint.tensors:
            raise ShardChangedError(f"{source}: was changed while it was being quantized; load it again")
        return Written(folder, checkpoint, catalog.moved(checkpoint))
    except BaseException:
        folder.cleanup()
        raise

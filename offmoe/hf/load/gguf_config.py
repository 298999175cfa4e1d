"""The configuration of a GGUF model: from a config.json beside the file, or from the file's own metadata.

A config.json beside the file wins, because it says everything: metadata lack a few values, and each architecture's
table fills them in as llama.cpp does. Both must agree on STRUCTURE. One log line says which was taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from offmoe.errors import CheckpointError, OffmoeError, UnsupportedModelError
from offmoe.hf.gguf.architectures import GgufModel
from offmoe.hf.gguf.metadata import ComputesOtherwiseError
from offmoe.hf.load import generation
from offmoe.hf.load.config import CONFIG_FILE, check_config, read_config
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.gguf_set import GgufSet
from offmoe.storage.gguf_types import PLAIN_TYPES

logger = logging.getLogger(__name__)

STRUCTURE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "moe_intermediate_size",
)
"""Values that a config.json beside a file must not contradict: with another one, tensors would be cut differently."""


NOT_COMPARED = frozenset({"model_type", "max_position_embeddings", "tie_word_embeddings", *STRUCTURE})
NOT_COMPARED |= {f"{name}_token_id" for name in ("bos", "eos", "pad")}
"""Values that may differ without another result, or that were compared before."""


class GgufConfig(NamedTuple):
    """The configuration of a GGUF model.

    Args:
        config: the configuration.
        folder: of the config.json that says it, whose generation_config.json counts too; None: the metadata say it.
    """

    config: PreTrainedConfig
    folder: Path | None


def gguf_config(checkpoint: Checkpoint, beside: Sequence[Path]) -> GgufConfig:
    """Read the configuration of a GGUF model.

    Args:
        checkpoint: the model's headers.
        beside: as `Source.beside`.

    Raises:
        UnsupportedModelError: offmoe does not run the architecture, or the metadata do not describe it completely.
        CheckpointError: the metadata are damaged, or contradict the config.json beside the file.
    """
    assert checkpoint.gguf is not None
    model, file = GgufModel.of(checkpoint.gguf), checkpoint.model
    folder = next((folder for folder in beside if (folder / CONFIG_FILE).is_file()), None)
    stated = None if folder is None else _config_beside(model, file, folder / CONFIG_FILE)
    if (stated is None or folder != file.parent) and (file.parent / generation.FILE).is_file():
        logger.warning(
            "%s: counts only with the model's config.json beside it; generation goes by the metadata's end tokens",
            file.parent / generation.FILE,
        )
    config = _from_metadata(model, file) if stated is None else stated
    config.tie_word_embeddings = "output.weight" not in checkpoint.tensors  # llama.cpp uses what the file has
    if getattr(config, "dtype", None) is None:
        config.dtype = _dtype(checkpoint.gguf)
    config.name_or_path = str(file)
    return GgufConfig(config, None if stated is None else folder)


def _config_beside(model: GgufModel, file: Path, path: Path) -> PreTrainedConfig | None:
    """The configuration in the config.json at `path`; None if it is of another model."""
    try:
        config = read_config(path).get_text_config()
    except OffmoeError as error:
        if path.parent == file.parent and not isinstance(error, UnsupportedModelError):
            raise
        logger.warning("%s; the configuration is taken from the metadata of %s", error, file.name)
        return None
    if config.model_type not in model.how.model_types:
        logger.warning(
            "%s: is of %r and not of %s, which the file beside it holds; the configuration is taken from the metadata "
            "of %s",
            path,
            config.model_type,
            " or ".join(map(repr, model.how.model_types)),
            file.name,
        )
        return None
    try:
        stated = model.how.config(model.metadata)
    except ComputesOtherwiseError:
        raise
    except OffmoeError:  # the metadata need not be enough here
        stated = {}
    for name in STRUCTURE:
        ours, theirs = getattr(config, name, None), stated.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            raise CheckpointError(
                f"{path}: says {name}={ours}, the metadata of {file.name} say {theirs}; remove config.json, or put the "
                "one of this model there"
            )
    own = config.to_dict()
    compared = stated.keys() & own.keys() - NOT_COMPARED
    differing = sorted(name for name in compared if _differs(own[name], stated[name]))
    if differing:
        logger.warning(
            "%s: says %s, the metadata of %s give %s; config.json counts",
            path,
            ", ".join(f"{name}={own[name]}" for name in differing),
            file.name,
            ", ".join(f"{name}={stated[name]}" for name in differing),
        )
    logger.info("%s: the configuration is that of %s", file, path)
    return config


def _differs(ours: object, stated: object) -> bool:
    """Whether a value of the configuration, if it has one, is another one than the metadata state."""
    if ours is None:
        return False
    if isinstance(ours, dict) and isinstance(stated, dict):
        return any(ours[key] != value for key, value in stated.items() if key in ours)
    return bool(ours != stated)


def _from_metadata(model: GgufModel, file: Path) -> PreTrainedConfig:
    """The configuration that the metadata describe."""
    values = model.how.config(model.metadata)
    for remark in model.metadata.remarks:
        logger.warning("%s: %s", file, remark)
    unread = model.metadata.unread()
    if unread:
        logger.warning("%s: %s changes nothing here, because offmoe does not know it", file, ", ".join(unread))
    logger.info("%s: the configuration is that of the file's metadata; a config.json beside the file would win", file)
    return _build(values, file)


def _build(values: Mapping[str, Any], file: Path) -> PreTrainedConfig:
    kind = values["model_type"]
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{file}: transformers {transformers.__version__} has no model type {kind!r}; use a newer transformers"
        )
    check_config(values, file)
    options = {name: value for name, value in values.items() if name != "model_type"}
    try:
        config: PreTrainedConfig = AutoConfig.for_model(kind, **options)
    except Exception as error:  # each architecture's config has validators of its own
        raise CheckpointError(f"{file}: its metadata are no configuration of {kind!r} ({error})") from error
    return config


def _dtype(gguf: GgufSet) -> torch.dtype:
    """The dtype to compute in: that of the matrices if none is quantized, else bfloat16."""
    kinds = {PLAIN_TYPES.get(gguf.types[name]) for name, info in gguf.tensors.items() if len(info.shape) > 1}
    if torch.bfloat16 in kinds or None in kinds:
        return torch.bfloat16
    return torch.float16 if torch.float16 in kinds else torch.float32

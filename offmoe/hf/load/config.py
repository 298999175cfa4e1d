"""Read a model's config.json, and find the transformers class that it describes. A checkpoint's own code never runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.hub.config_checks import check_config, check_generation, read_object
from offmoe.storage.checkpoint import INDEX_FILE, PICKLES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG_FILE = "config.json"
PACK_MANIFEST = "offmoe-pack.json"
"""File in which `offmoe pack` lists the shards that it has finished. Without a config.json there, packing was
interrupted."""
WEIGHTS = (".safetensors", INDEX_FILE, *PICKLES)
"""Endings of the files that make a folder more than a configuration."""


def lone_config(model: str | os.PathLike[str]) -> Path | None:
    """The configuration file of a model without weights: a .json file, or config.json of a folder without weights.

    Returns:
        None if `model` is neither.
    """
    path = Path(os.path.expanduser(os.fspath(model)))
    if os.path.isfile(path) and path.suffix == ".json":
        return path
    has_config = os.path.isdir(path) and os.path.isfile(path / CONFIG_FILE)
    return path / CONFIG_FILE if has_config and not any(n.endswith(WEIGHTS) for n in os.listdir(path)) else None


def read_config(model: str | os.PathLike[str]) -> PreTrainedConfig:
    """Read a model's configuration. Code that comes with a checkpoint is never run.

    Args:
        model: a folder with config.json, or a .json file.

    Raises:
        CheckpointError: config.json is absent, or it or generation_config.json is damaged.
        UnsupportedModelError: transformers does not know the model type.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(model) if os.path.isfile(model) else Path(model) / CONFIG_FILE
    try:
        values = read_object(path)
    except FileNotFoundError:
        if os.path.exists(path.with_name(PACK_MANIFEST)):
            raise CheckpointError(
                f"{path.parent}: packing into this folder was interrupted; run the same 'offmoe pack' again, and it "
                "goes on where it was"
            ) from None
        raise CheckpointError(f"{path}: is not there; give the folder of a complete model") from None
    model_type = values.get("model_type")
    if not model_type or not isinstance(model_type, str):
        raise CheckpointError(f'{path}: has no "model_type", so it is not the config of a transformers model')
    if model_type not in CONFIG_MAPPING:
        own_code = ", and offmoe does not run a checkpoint's own code" if "auto_map" in values else ""
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} has no model type {model_type!r}{own_code}; "
            "use a newer transformers, if one knows it"
        )
    check_config(values, path)
    check_generation(path.parent)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # each architecture's config has validators of its own
        raise CheckpointError(f"{path}: not a valid config of {model_type!r} ({error}); download it again") from error
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The architecture's own class that generates text; for a config with vision, the class that takes images too.

    Raises:
        UnsupportedModelError: transformers has no such class for this configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    order = [AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText]
    if getattr(config, "vision_config", None) is not None:
        order.reverse()
    for auto in order:
        classes = auto._model_mapping
        if classes is not None and type(config) in classes:
            entry = classes[type(config)]
            cls: type[PreTrainedModel] = entry[0] if isinstance(entry, (list, tuple)) else entry
            return cls
    raise UnsupportedModelError(
        f"transformers has no text-generating class for {type(config).__name__} (model type {config.model_type!r}); "
        "offmoe runs causal, sequence-to-sequence and image-text models"
    )

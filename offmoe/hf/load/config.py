"""Read and check a model's config.json, find the transformers class that it describes, and build it without weights.

A checkpoint's own code never runs. config.json is checked before transformers builds anything from it. transformers
accepts any number: it builds a billion layers one after the other until the memory is full, and a token id that is a
word fails in `generate`, long after the weights were loaded. The limits are far above those of any real model. Fields
that are not known here are left to transformers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from offmoe.errors import CheckpointError, UnsupportedModelError, out_of_memory
from offmoe.hf.load.generation import check_generation
from offmoe.hf.load.json_values import Fault, fault_error, read_object, token_faults
from offmoe.storage.checkpoint import INDEX_FILE, PICKLES

CONFIG_FILE = "config.json"
PACK_MANIFEST = "offmoe-pack.json"
"""File in which `offmoe pack` lists the shards that it has finished. Without a config.json there, packing was
interrupted."""
WEIGHTS = (".safetensors", ".gguf", INDEX_FILE, *PICKLES)
"""Endings of the files that make a folder more than a configuration."""
LIMITS = {"layers": 10_000, "experts": 100_000}
"""Largest number allowed in a field whose name holds the word. The largest models have 126 layers and 2,048 experts."""


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


def read_config(model: str | os.PathLike[str], *, generates: bool = True) -> PreTrainedConfig:
    """Read a model's configuration. Code that comes with a checkpoint is never run.

    Args:
        model: a folder with config.json, or a .json file.
        generates: check generation_config.json too, if the folder has one.

    Raises:
        CheckpointError: config.json is absent, or it or generation_config.json is damaged.
        UnsupportedModelError: transformers does not know the model type.
    """
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
    if generates:
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


class _NoInitialization(TorchFunctionMode):
    """Skips torch.nn.init: tensors on the meta device have no values, and initializing 60,000 experts takes longer than
    constructing them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def build_meta(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    """Build a `cls` on the meta device, experts included, in eval mode. `config` is not changed.

    Raises:
        CheckpointError: the configuration describes no such model.
    """
    name = Path(str(config.name_or_path))
    try:
        with torch.device("meta"), _NoInitialization():
            model = cls(copy.deepcopy(config))
    except Exception as error:  # contradicting sizes fail anywhere in an architecture
        if out_of_memory(error):
            raise
        raise CheckpointError(
            f"{name if name.suffix in ('.json', '.gguf') else name / CONFIG_FILE}: does not describe a {cls.__name__} "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    model.eval()
    return model


def check_config(values: Mapping[str, Any], path: Path) -> None:
    """Check a model's configuration, and the configurations inside it (text_config).

    Args:
        values: the parsed config.json.
        path: the file, for messages.

    Raises:
        CheckpointError: a number of layers or experts that no model has, or a token id that is not one.
    """
    for fault in config_faults(values):
        raise fault_error(path, fault)


def config_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """The values of a configuration, and of those inside it (text_config), that no model has.

    They are numbers of layers or experts beyond any model's, and token ids that are none.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from config_faults(value)
        for word, limit in LIMITS.items():
            if word in str(name) and isinstance(value, (int, float)) and not value <= limit:
                yield name, value, f"a number up to {limit}"
    yield from token_faults(values)

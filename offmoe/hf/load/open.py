"""Read what a model is: its configuration, its class in transformers, and the headers of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.hf.hub.locate import Source
from offmoe.hf.load.config import model_class
from offmoe.hf.load.generation import check_generation
from offmoe.hf.load.gguf_config import gguf_config
from offmoe.hf.load.load import require_index
from offmoe.hf.load.options import ModelOptions
from offmoe.hf.load.overrides import changed_config
from offmoe.hf.load.own_code import check_own_code
from offmoe.storage.checkpoint import Checkpoint


class OpenedSource(NamedTuple):
    """A model whose configuration and headers were read.

    Args:
        config: its configuration.
        model_class: its class in transformers.
        checkpoint: its headers.
        generation_folder: the folder whose generation_config.json is the model's; None if the folder has none for it.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    checkpoint: Checkpoint
    generation_folder: Path | None


def open_source(source: Source, asked: ModelOptions | None = None) -> OpenedSource:
    """Read a model's configuration and headers; no weight is read.

    Args:
        source: the model.
        asked: options of transformers, which may change the configuration.

    Raises:
        ConfigError: an option does not go with the model.
        OffmoeError: the model is damaged, incomplete, or of a kind that offmoe does not run.
    """
    asked = asked or ModelOptions()
    if source.file is not None:
        checkpoint = source.checkpoint()
        stored, folder = gguf_config(checkpoint, source.beside)
        config = changed_config(stored, asked.change)
        return OpenedSource(config, model_class(config), checkpoint, folder)
    if asked.reads_generation_config:
        check_generation(source.folder)
    config = changed_config(source.folder, asked.change)
    if asked.trusted:
        check_own_code(source, config)
    cls = model_class(config)
    checkpoint = source.checkpoint()
    require_index(checkpoint)
    return OpenedSource(config, cls, checkpoint, source.folder)

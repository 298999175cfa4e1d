"""Read what a model is: its configuration, its class in transformers, and the headers of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.hf.hub.locate import Source
from offmoe.hf.load.config import model_class, read_config
from offmoe.hf.load.gguf_config import gguf_config
from offmoe.hf.load.load import require_index
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


def open_source(source: Source) -> OpenedSource:
    """Read a model's configuration and headers; no weight is read.

    Raises:
        OffmoeError: the model is damaged, incomplete, or of a kind that offmoe does not run.
    """
    if source.file is not None:
        checkpoint = source.checkpoint()
        config, from_file = gguf_config(checkpoint)
        return OpenedSource(config, model_class(config), checkpoint, source.folder if from_file else None)
    config = read_config(source.folder)
    cls = model_class(config)
    checkpoint = source.checkpoint()
    require_index(checkpoint)
    return OpenedSource(config, cls, checkpoint, source.folder)

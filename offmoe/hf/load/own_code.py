"""Code that comes with a checkpoint, which offmoe never runs."""

from __future__ import annotations

import logging

from transformers import PreTrainedConfig

from offmoe.errors import ConfigError
from offmoe.hf.hub.locate import Source

logger = logging.getLogger(__name__)

OWN_GENERATE = "custom_generate/generate.py"
"""The file from which transformers takes a model's own `generate`, if it may."""


def check_own_code(source: Source, config: PreTrainedConfig) -> None:
    """Say what `trust_remote_code=True` would have run.

    Raises:
        ConfigError: The checkpoint has a `generate` of its own, so texts would silently be others than in transformers.
    """
    if source.has(OWN_GENERATE):
        raise ConfigError(
            f"trust_remote_code: the checkpoint has a generate() of its own ({OWN_GENERATE}), which offmoe does not "
            "run. Leave trust_remote_code out to generate with that of transformers."
        )
    if getattr(config, "auto_map", None):
        logger.warning(
            "trust_remote_code: the model runs with the code of transformers, not with the checkpoint's own (%s)",
            source.folder,
        )

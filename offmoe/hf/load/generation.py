"""A model's generation_config.json: check it before any weight is read, or leave its settings out.

transformers applies the file to every `generate`. A value that it cannot use fails there, long after the weights were
loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from offmoe.errors import CheckpointError
from offmoe.hf.load.json_values import are_ids, fault_error, faults, is_id, is_number, read_object, token_faults

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
COUNTS = ("num_beams", "num_return_sequences", "max_new_tokens", "max_length", "top_k")
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
NO_SETTINGS = (*SPECIAL_TOKENS, "transformers_version", "use_cache")
"""Values that every model's file holds, and that say nothing about how to generate."""


def check_generation(folder: Path) -> None:
    """Check generation_config.json, if the folder has one. A file that transformers ignores is only warned of.

    Raises:
        CheckpointError: `generate` could not use it.
    """
    path = folder / FILE
    try:
        values = read_object(path)
    except FileNotFoundError:
        return
    except CheckpointError as error:
        if not _is_ignored(folder):
            raise
        logger.warning("%s; its settings are left out, as transformers leaves them out", error)
        return
    wrong = chain(
        token_faults(values),
        faults(values, TOKEN_LISTS, are_ids, "a list of token ids"),
        faults(values, COUNTS, lambda value: is_id(value) and value >= 0, "a whole number, 0 or more"),
        faults(values, NUMBERS, is_number, "a number"),
    )
    for fault in wrong:
        raise fault_error(path, fault)
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # values of any type meet comparisons of any kind
        what = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: transformers cannot use it ({what}). Mend the file, or leave its settings out: "
            "generation_config=GenerationConfig() in Python, --no-generation-config on the command line."
        ) from error


def _is_ignored(folder: Path) -> bool:
    """Whether transformers loads a model as if its generation_config.json were not there."""
    try:
        GenerationConfig.from_pretrained(folder)
    except OSError:
        return True
    except Exception:  # a file that is no object fails anywhere in it
        return False
    return False


def model_generation(folder: Path | None, config: PreTrainedConfig) -> GenerationConfig:
    """The generation config that transformers gives a model: the file's, or without one what the configuration says.

    Args:
        folder: of generation_config.json; None if the model has none.
        config: the model's configuration.
    """
    if folder is not None:
        with suppress(OSError):
            return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def plain_generation(folder: Path | None, config: PreTrainedConfig) -> GenerationConfig:
    """The special tokens of a model's generation_config.json, without its settings: greedy decoding.

    Values that transformers itself does not know stay, since the model's own `generate` may need them.

    Args:
        folder: as `model_generation`.
        config: as `model_generation`.
    """
    values = {name: getattr(config.get_text_config(), name, None) for name in SPECIAL_TOKENS}
    if folder is not None:
        with suppress(FileNotFoundError, CheckpointError):
            values = read_object(folder / FILE)
    known = vars(GenerationConfig())
    wrong = {name for name, _, _ in token_faults(values)}
    kept = {
        name: v for name, v in values.items() if name not in wrong and (name in SPECIAL_TOKENS or name not in known)
    }
    return _Plain(**kept)


class _Plain(GenerationConfig):
    """A generation config that lists only what is set, since some models' own class knows none of the rest."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if value is not None}


def settings(config: GenerationConfig) -> Mapping[str, Any]:
    """What a generation config asks for, apart from special tokens and what is so anyway."""
    defaults = GenerationConfig._get_default_generation_params()
    asked = config.to_diff_dict()
    return {
        name: value
        for name, value in asked.items()
        if name not in NO_SETTINGS
        and not name.startswith("_")
        and value is not None
        and not (name in defaults and value == defaults[name])
        and not (value is False and name.startswith("output_"))
    }

"""Another configuration than the checkpoint's own: `config=`, and keywords of from_pretrained that are values of it.

They act as in `AutoModelForCausalLM.from_pretrained`: on the configuration, before anything is planned. So top_k,
layers and sizes are those of the changed configuration everywhere.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from offmoe.errors import CheckpointError, ConfigError, OffmoeError, out_of_memory
from offmoe.hf.load.config import config_faults, read_config
from offmoe.text import did_you_mean

ALWAYS_TAKEN = frozenset({"attn_implementation", "num_labels", "output_attentions"})
"""Values that every configuration takes in its constructor, even if none has an attribute of that name."""
NAMED = 6
"""Keywords that a message names at most."""


@dataclass(frozen=True)
class ConfigChange:
    """What a caller of `from_pretrained` asks of the model's configuration.

    Args:
        config: In place of the checkpoint's own: an object, or the path of a folder or of a .json file.
        values: Values to change in it.
    """

    config: PreTrainedConfig | str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.config is not None or bool(self.values)

    def __str__(self) -> str:
        """The keywords, for messages."""
        given = [] if self.config is None else [f"config={type(self.config).__name__}"]
        if isinstance(self.config, str):
            given = [f"config={self.config!r}"]
        given += [f"{name}={repr(value)[:60]}" for name, value in self.values.items()]
        return ", ".join(given[:NAMED]) + (f" and {len(given) - NAMED} more" if len(given) > NAMED else "")


def changed_config(model: Path | PreTrainedConfig, change: ConfigChange) -> PreTrainedConfig:
    """The configuration of a model, changed as a caller asks.

    Args:
        model: The model's folder, or its configuration if that is in no config.json.
        change: What the caller asks.

    Raises:
        ConfigError: The configuration has no such value, or none may be like that.
        OffmoeError: What `read_config` raises.
    """
    if isinstance(change.config, PreTrainedConfig):
        return _of_object(change.config, change.values)
    source = model
    if change.config is not None:
        source = Path(os.path.expanduser(change.config))
        if not source.exists():
            raise ConfigError(f"config={change.config!r}: there is no such folder or file; give a local one.")
    config = source if isinstance(source, PreTrainedConfig) else read_config(source, generates=False)
    if not change.values:
        return config
    _check_values(config, change.values)
    try:
        changed: PreTrainedConfig
        if isinstance(source, PreTrainedConfig):
            changed = type(source).from_dict(source.to_dict(), **change.values)
        else:
            changed = AutoConfig.from_pretrained(source, trust_remote_code=False, **change.values)
    except Exception as error:  # each architecture's config has validators of its own
        raise ConfigError(f"{change}: not valid in a {type(config).__name__} ({_line(error)}).") from error
    return changed


@contextmanager
def without_change(change: ConfigChange, unchanged: Callable[[], object]) -> Iterator[None]:
    """Blame the caller's change of the configuration for what goes wrong in the block, if it is to blame.

    Values may be anything and fail anywhere in an architecture, or describe a model that the checkpoint does not hold.

    Args:
        change: What the caller asks of the configuration.
        unchanged: Does the same as the block without the change.

    Raises:
        ConfigError: The block failed, and `unchanged` does not.
    """
    try:
        yield
    except Exception as error:
        if not change or isinstance(error, ConfigError) or out_of_memory(error):
            raise
        if isinstance(error, OffmoeError):
            if not isinstance(error, CheckpointError) or _fails(unchanged):
                raise
            what = f"the checkpoint holds no such model: {_line(error).partition(';')[0]}"
        else:
            what = f"{type(error).__name__}: {_line(error)}"
        raise ConfigError(f"{change}: {what}. Leave it out, or give another value.") from error


def _fails(action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception:
        return True
    return False


def _of_object(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for name, value in values.items():
        if name != "attn_implementation":
            raise ConfigError(
                f"{name!r} and config= are both given, and transformers then takes no single values; set "
                f"config.{name} on the object."
            )
        config._attn_implementation = value
    return config


def _check_values(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """Refuse names that are no values of the configuration, which transformers gives to the model's constructor."""
    for name in values:
        if name in ALWAYS_TAKEN:
            continue
        if name.startswith("__") or not hasattr(config, name) or callable(getattr(type(config), name, None)):
            parts = [part for part in config.sub_configs if hasattr(getattr(config, part, None), name)]
            hint = did_you_mean(name, sorted(config.to_dict()))
            if parts:
                hint = f" (its {parts[0]} has one: {parts[0]}={{{name!r}: ...}})"
            raise ConfigError(
                f"{name!r} is no option of offmoe, nor of transformers' from_pretrained, nor a value of "
                f"{type(config).__name__}{hint}."
            )
    for name, value, wanted in config_faults(values):
        raise ConfigError(f"{name}={repr(value)[:40]} must be {wanted}.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

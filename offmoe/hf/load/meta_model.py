"""Build a whole model on the meta device: every parameter has a shape and no bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from offmoe.errors import CheckpointError, out_of_memory
from offmoe.hf.load.config import CONFIG_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
            f"{name if name.suffix == '.json' else name / CONFIG_FILE}: does not describe a {cls.__name__} "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    model.eval()
    return model

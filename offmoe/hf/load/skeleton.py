"""Make transformers construct a model whose experts modules have no parameters.

The model is built by a subclass of the architecture's class. The subclass carries the class's own names, because
conversions and checks of transformers are keyed on them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from offmoe.errors import UnsupportedModelError
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.hf.upstream import forget_tie

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def without_experts(cls: type[PreTrainedModel], expert_names: frozenset[str]) -> type[PreTrainedModel]:
    """A subclass of `cls`, under the same name, that constructs models without experts' parameters.

    Args:
        cls: the architecture's class.
        expert_names: full names of all experts' parameters; the loader then does not report them as unexpected.
    """

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        cls.__init__(self, config, *args, **kwargs)
        _strip(self)
        ignored = {_exactly(name, self.base_model_prefix) for name in expert_names}
        self._keys_to_ignore_on_load_unexpected = set(self._keys_to_ignore_on_load_unexpected or ()) | ignored

    names = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), names)


def _strip(model: PreTrainedModel) -> None:
    """Delete the experts' parameters. The loader then has no place for their tensors and leaves them in the shards."""
    for name, module in find_experts(model).items():
        if any(part._non_persistent_buffers_set for part in module.modules()):
            raise UnsupportedModelError(f"experts {name!r} compute their own buffers, which offmoe does not run yet")
        adapter = require_adapter(module)
        for param in adapter.places(module):
            forget_tie(model, f"{name}.{param}")
        adapter.strip(module)


def _exactly(name: str, prefix: str) -> str:
    """Regular expression for one parameter's name as the loader reports it: with or without the base prefix."""
    return rf"^(?:{re.escape(prefix)}\.)?{re.escape(name.removeprefix(f'{prefix}.'))}$"

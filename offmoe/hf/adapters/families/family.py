"""What adapters of architectures outside transformers' registry share.

Nothing moves here. A class claims the module whose forward it replaces: the experts module where that gets ids and
weights, the block around it where ids are made there. Its own parts (routers, shared experts, biases) go on computing;
only the loop over experts becomes a call of `rows`. All but one of these architectures add the experts of a token one
after the other, in ascending order and in the hidden dtype, and so does `accumulate`.

What it must never do: import a modeling file (a class is known by its name and its module's), or repair what an
architecture computes: quirks of transformers 5.23 that are reproduced are said so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from offmoe.hf.adapters.base import ExpertsAdapter, Place, Rows

Activation = Callable[[Tensor], Tensor]


class Family(ExpertsAdapter):
    """What all of them share: a module is known by its class, and keeps all experts in parameters of its own."""

    by_choice = True  # torch.where on [k, T] gives choices first
    family: str
    """The package under transformers.models."""
    name: str
    """Of the class."""
    params: tuple[str, ...]
    """Names, each of a parameter that holds all experts'."""

    def claims(self, module: nn.Module) -> bool:
        cls = type(module)
        return cls.__name__ == self.name and cls.__module__.startswith(f"transformers.models.{self.family}.")

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(module.get_parameter(name).shape[1:]) for name in self.params}

    def places(self, module: nn.Module) -> dict[str, Place]:
        return {name: Place(name) for name in self.params}

    def connect(self, module: nn.Module, rows: Rows) -> None:
        module.forward = self.forward(module, rows)

    @abstractmethod
    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        """The module's forward, its experts computed by `rows`."""

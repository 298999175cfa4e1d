"""What offmoe must know about a kind of experts module: the parameters of one expert, and how the module calls it.

Every experts module in transformers' registry is of one kind, `RegistryExperts`, known by the attributes that the
registry's decorator sets. An architecture outside the registry has a small class in families/, a `FamilyExperts`.
Everything else in offmoe works on what an adapter says and knows no architecture.

An adapter never imports a modeling file, and it reproduces what the module of transformers 5.23 computes, dropped
tokens and quirks included. Where that differs from the architecture's paper, the class says so.

The tests pass on transformers 5.17.0 and 5.23.0. Attributes that only the later ones set (`_is_expert_parallel`,
`has_post_expert_norm`) may be absent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offmoe.compute.expert_layer import TokenOrder
from offmoe.compute.kernels.torch_ffn import ExpertMath, GatedFFN
from offmoe.hf.adapters import reroute
from offmoe.hf.adapters.reroute import Choose

Activation = Callable[[torch.Tensor], torch.Tensor]
"""An elementwise activation function."""


class Experts(Protocol):
    """The experts of one MoE layer, as a module's forward calls them."""

    def routed(self, ids: torch.Tensor) -> torch.Tensor:
        """The expert ids [T, k] to compute with: the router's own, or those of a recorded routing in their place."""

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Run every token through its experts.

        Args:
            hidden: [T, H], or [T * k, H] if each (token, expert) pair has an input of its own.
            ids: expert ids [T, k].

        Returns:
            [T * k, H], not weighted, in the order of `ids`. A row whose id belongs to no expert is zero.
        """

    def with_math(self, math: ExpertMath) -> Experts:
        """The same experts computing `math`, for an architecture whose math depends on the step."""


class Place(NamedTuple):
    """Which expert's weights a parameter of the model holds."""

    param: str
    """The name that `ExpertsAdapter.shapes` gives this parameter of one expert."""
    expert: int | None = None
    """The expert; None if the parameter holds all experts, stacked along its first dimension."""
    entries: int | None = None
    """Rows in the stacked parameter, if it is longer than num_experts. The rows behind the last expert are ignored."""


class Routing(NamedTuple):
    """How to read a layer's expert ids from the outputs of its router."""

    router: nn.Module | None
    """None stands for whichever module puts out the tensor that the experts module gets as ids."""
    ids: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """Takes the router's outputs (with router None, that one tensor) and returns int [T, k]."""


def ids_as_they_are(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ids of a router whose first output they are: [..., k] -> [T, k]."""
    return outputs[0].reshape(-1, outputs[0].shape[-1])


class NotInModel:
    """Stands in a module where an expert's parameter was.

    torch.func.functional_call replaces tensors only. Where there is nothing it adds one, which experts would not see.
    """

    def __repr__(self) -> str:
        return "the weights of experts, which are not in this model, so that they cannot be replaced in it: this"


NOT_IN_MODEL = NotInModel()


class ExpertsAdapter(ABC):
    """One kind of experts module. Every method except `claims` must be called with a module that the adapter claims.

    Unless a subclass says otherwise, each parameter under the module holds all experts, along its first dimension.
    """

    order = TokenOrder.SORTED_IDS
    """The order in which the experts see their tokens."""

    @abstractmethod
    def claims(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind. Also works after `strip`."""

    @abstractmethod
    def names(self, module: nn.Module) -> Sequence[str]:
        """Names of one expert's parameters, those that `math` reads."""

    def num_experts(self, module: nn.Module) -> int:
        """The number of experts whose weights the module has. Works only before `strip`."""
        return int(module.get_parameter(self.names(module)[-1]).shape[0])

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes of one expert's parameters, by the names that `math` reads. Works only before `strip`."""
        return {name: tuple(module.get_parameter(name).shape[1:]) for name in self.names(module)}

    def places(self, module: nn.Module) -> dict[str, Place]:
        """The module's parameters that belong to experts, by their names under `module`. Works only before `strip`."""
        return {name: Place(name) for name in self.names(module)}

    def strip(self, module: nn.Module) -> None:
        """Delete the experts' parameters. The loader then has no place for their tensors and leaves them on disk."""
        holders = {module}
        for name in self.places(module):
            owner, _, param = name.rpartition(".")
            weight = module.get_submodule(owner)._parameters.pop(param)  # not None: that would refuse plain tensors
            assert weight is not None
            # a plain attribute is in no state dict; some blocks initialize their experts and look for it by name
            setattr(module.get_submodule(owner), param, weight.detach().to("meta"))
            while owner:
                holders.add(module.get_submodule(owner))
                owner = owner.rpartition(".")[0]
        for holder in holders:
            # not an attribute of Module; the initialization of missing weights looks parameters up by name
            setattr(holder, "_is_hf_initialized", True)  # noqa: B010

    def settle(self, module: nn.Module) -> None:
        """After loading, replace the plain attributes that `strip` put in the place of parameters by `NOT_IN_MODEL`."""
        for part in module.modules():
            for name in [n for n, value in vars(part).items() if isinstance(value, torch.Tensor) and value.is_meta]:
                setattr(part, name, NOT_IN_MODEL)

    def top_k(self, module: nn.Module) -> int | None:
        """Experts per token; None if the modules around this one or the configuration say it."""
        return None

    def routing(self, module: nn.Module) -> Routing | None:
        """How to read its ids from a router; None if they depend on more than the router's outputs."""
        return Routing(None, ids_as_they_are)

    @abstractmethod
    def math(self, module: nn.Module) -> ExpertMath:
        """The function that one expert computes. Also works after `strip`."""

    @abstractmethod
    def connect(self, module: nn.Module, experts: Experts) -> None:
        """Make this one module compute through `experts` from now on."""

    def reroute(self, module: nn.Module, choose: Choose) -> RemovableHandle:
        """Make a module of stock transformers compute with the ids that `choose` returns, until the handle is removed.

        Its output is then that of the same module connected to experts whose `routed` is `choose`.
        """
        return reroute.ids_argument(module, choose)

    def null_ids(self, module: nn.Module) -> Sequence[int]:
        """Ids that the module's forward understands as "no expert"; empty if every choice needs an expert."""
        return ()


class RegistryExperts(ExpertsAdapter):
    """Any class decorated with transformers' `use_experts_implementation`: fused parameters, experts first."""

    ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    """What the decorator sets on every instance."""

    def claims(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in self.ATTRIBUTES)

    def names(self, module: nn.Module) -> Sequence[str]:
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if module.has_bias else names

    def math(self, module: nn.Module) -> ExpertMath:
        return GatedFFN(
            up=self.names(module)[0],
            activate=module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
            biased=bool(module.has_bias),
            transposed=bool(module.is_transposed),
            normalize=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,  # type: ignore[arg-type]
        )

    def connect(self, module: nn.Module, experts: Experts) -> None:
        """Nothing to do: transformers calls the function that hf/load/attach.py registers."""


class FamilyExperts(ExpertsAdapter):
    """Base of the adapters for architectures outside the registry; each one claims a module class by its name.

    A subclass claims the module whose forward it replaces: the experts module where that gets ids and weights, the
    block around it where the block computes the ids. Routers, shared experts and biases go on computing; only the loop
    over experts becomes a call of `experts`. All but one of these architectures add up a token's experts one after the
    other, in ascending order and in the hidden dtype, and so does `accumulate`.
    """

    order = TokenOrder.CHOICES_FIRST  # they look for an expert's tokens in a mask [k, T]: first choices come first
    family: str
    """The package under transformers.models."""
    name: str
    """Name of the module's class."""
    params: tuple[str, ...]
    """What `names` gives."""

    def claims(self, module: nn.Module) -> bool:
        cls = type(module)
        return cls.__name__ == self.name and cls.__module__.startswith(f"transformers.models.{self.family}.")

    def names(self, module: nn.Module) -> Sequence[str]:
        return self.params

    def connect(self, module: nn.Module, experts: Experts) -> None:
        module.forward = partial(self.forward, module, experts)

    @abstractmethod
    def forward(self, module: Any, experts: Experts, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, which computes its experts through `experts`."""

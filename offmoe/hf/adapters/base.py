"""What offmoe must know about a kind of experts module: what an expert's parameters are, and how the module calls it.

Nothing moves here. Every experts module in transformers' registry is of one kind, known by the attributes that the
registry's decorator sets; an architecture outside the registry has a small class in families/. Everything else in
offmoe works on what an adapter says and knows no architecture.

What it must never do: compute anything that the module it stands for would not, dropped tokens and quirks included.

The tests pass on transformers 5.17.0 and 5.23.0. What only the later ones set (`_is_expert_parallel`,
`has_post_expert_norm`) is not relied on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offmoe.compute.kernels import ExpertMath, GatedFFN, combine
from offmoe.hf.adapters import reroute
from offmoe.hf.adapters.reroute import Choose

HANDLE = "_offmoe"
"""Attribute of a registry module that holds what computes for it."""


class Rows(Protocol):
    """What an adapter's forward computes experts through."""

    def routed(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids [T, k] to compute with: these of the router, unless others are put in their place."""

    def __call__(self, math: ExpertMath, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], ids [T, k] -> [T * k, H]: every token through its experts, unweighted, in the order of ids.

        A row whose id is no expert's is zero. hidden may be [T * k, H]: each (token, expert) pair's own input.
        """


class Place(NamedTuple):
    """Whose weights a parameter of the model holds.

    param: the name of that parameter of one expert. expert: whose it is; None for all experts', which follow each other
    along its first dimension. entries: how many follow each other, if those behind the last expert's are nobody's.
    """

    param: str
    expert: int | None = None
    entries: int | None = None


class Routing(NamedTuple):
    """How the ids of a layer come from its router.

    router: the module; None: whichever module puts out the tensor that the experts module gets as ids. ids: what the
    router puts out (with None, that tensor alone) -> the ids that the experts get, int [T, k].
    """

    router: nn.Module | None
    ids: Callable[[Sequence[torch.Tensor]], torch.Tensor]


def ids_as_they_are(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The ids of a router that puts them out: [..., k] -> [T, k]."""
    return outputs[0].reshape(-1, outputs[0].shape[-1])


class ExpertsAdapter(ABC):
    """One kind of experts module. Methods but the first get a module that it claims."""

    by_choice = False
    """Whether its experts see all tokens' first choices before their second ones. The order decides the last bits on a
    CPU: the end of a tensor goes through other code than the vectorized rest.
    """

    @abstractmethod
    def claims(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind; also after `strip`."""

    @abstractmethod
    def num_experts(self, module: nn.Module) -> int:
        """Experts whose weights it has; before `strip`."""

    @abstractmethod
    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Of the parameters of one expert, by the names that `math` reads; before `strip`."""

    @abstractmethod
    def places(self, module: nn.Module) -> dict[str, Place]:
        """What each parameter under `module` holds that belongs to experts, by its name there; before `strip`."""

    def strip(self, module: nn.Module) -> None:
        """Delete experts' parameters. The loader then has no place for their tensors and leaves them in the shards."""
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
        """End what `strip` left for the time of loading."""
        for part in module.modules():
            for name in [n for n, value in vars(part).items() if isinstance(value, torch.Tensor) and value.is_meta]:
                delattr(part, name)

    def top_k(self, module: nn.Module) -> int | None:
        """Experts per token; None: as the modules around it or the configuration say."""
        return None

    def routing(self, module: nn.Module) -> Routing | None:
        """How its ids come from a router; None if they depend on more than what the router makes of its input."""
        return Routing(None, ids_as_they_are)

    @abstractmethod
    def math(self, module: nn.Module) -> ExpertMath:
        """What one expert computes; also after `strip`."""

    @abstractmethod
    def connect(self, module: nn.Module, rows: Rows) -> None:
        """Let this one module compute through `rows` from now on."""

    def reroute(self, module: nn.Module, choose: Choose) -> RemovableHandle:
        """Let a module of stock transformers compute with the experts that `choose` says, until the handle is removed.

        It gives then what the same module gives that is connected to rows whose `routed` is `choose`.
        """
        return reroute.ids_argument(module, choose)

    def nobodys(self, module: nn.Module) -> Sequence[int]:
        """Ids that its forward takes for choices that no expert's weights serve; none if every choice needs one."""
        return ()


class RegistryExperts(ExpertsAdapter):
    """Any class decorated with transformers' `use_experts_implementation`: fused parameters, experts first."""

    ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    """Set by the decorator on every instance."""

    def claims(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in self.ATTRIBUTES)

    def num_experts(self, module: nn.Module) -> int:
        return int(module.get_parameter("down_proj").shape[0])

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(module.get_parameter(name).shape[1:]) for name in self._names(module)}

    def places(self, module: nn.Module) -> dict[str, Place]:
        return {name: Place(name) for name in self._names(module)}

    def math(self, module: nn.Module) -> ExpertMath:
        return GatedFFN(
            up=self._up(module),
            activate=module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
            biased=bool(module.has_bias),
            transposed=bool(module.is_transposed),
            normalize=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,  # type: ignore[arg-type]
        )

    def connect(self, module: nn.Module, rows: Rows) -> None:
        math = self.math(module)

        def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return combine(rows(math, hidden, rows.routed(ids)), weights, hidden.dtype)

        setattr(module, HANDLE, forward)

    def _up(self, module: nn.Module) -> str:
        return "gate_up_proj" if module.has_gate else "up_proj"

    def _names(self, module: nn.Module) -> tuple[str, ...]:
        names = (self._up(module), "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if module.has_bias else names

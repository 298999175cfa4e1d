"""Find the experts modules of a model and the adapter of each. Only this module and families/ name architectures."""

from __future__ import annotations

from torch import nn

from offmoe.errors import UnsupportedModelError
from offmoe.hf.adapters.base import ExpertsAdapter, Place, RegistryExperts
from offmoe.hf.adapters.families.separate import NllbMoe, SwitchTransformers
from offmoe.hf.adapters.families.stacked import Dbrx, JetMoe, Llama4, LongcatFlash, Step3p7

TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
)
"""Names that architectures give the number of experts per token, as attributes of modules and of configs."""

FAMILIES = (Llama4(), Dbrx(), JetMoe(), LongcatFlash(), Step3p7(), SwitchTransformers(), NllbMoe())
"""Architectures whose experts are outside transformers' registry."""
ADAPTERS: tuple[ExpertsAdapter, ...] = (RegistryExperts(), *FAMILIES)


def adapter_of(module: nn.Module) -> ExpertsAdapter | None:
    """The adapter that claims `module`, if one does."""
    return next((adapter for adapter in ADAPTERS if adapter.claims(module)), None)


def require_adapter(module: nn.Module) -> ExpertsAdapter:
    """The adapter of an experts module, one that `find_experts` returned."""
    adapter = adapter_of(module)
    assert adapter is not None, f"{type(module).__name__} is no experts module"
    return adapter


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model by module path, in the order in which a forward pass calls them."""
    experts: dict[str, nn.Module] = {}
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[nn.Module] = set()
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if adapter_of(module) is not None:
            experts[name] = module  # nothing below it is searched: 2048 experts may be modules of their own
            continue
        prefix = f"{name}." if name else ""
        waiting += [(prefix + child, part) for child, part in reversed(list(module.named_children()))]
    return experts


def expert_parameters(model: nn.Module) -> dict[str, tuple[str, Place]]:
    """All experts' parameters of a model: full name -> (name of the experts module, what the parameter holds)."""
    out: dict[str, tuple[str, Place]] = {}
    for name, module in find_experts(model).items():
        adapter = require_adapter(module)
        out |= {f"{name}.{param}": (name, place) for param, place in adapter.places(module).items()}
    return out


def find_top_k(module: nn.Module, block: nn.Module, config: object) -> int:
    """The number of experts per token of one MoE layer.

    It is looked up in this order: the adapter; then, under any of TOP_K_NAMES, the experts module, the block around it,
    the block's other children (one of them is the router), the layer's config, the model's config.

    Args:
        module: the experts module.
        block: the module that `module` is a child of.
        config: the model's config.

    Raises:
        UnsupportedModelError: none of them has the number.
    """
    adapter = adapter_of(module)
    known = None if adapter is None else adapter.top_k(module)
    if known is not None:
        return known
    for source in (module, block, *block.children(), getattr(module, "config", None), config):
        for name in TOP_K_NAMES:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise UnsupportedModelError(
        f"cannot tell how many experts per token {type(block).__name__} uses: neither its modules nor config.json "
        f"have a number above 0 by any of the names {', '.join(TOP_K_NAMES)}"
    )


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> layer, in module order: all layers of every stack of layers that has experts somewhere."""
    stacks = dict.fromkeys(_stack_of(model, name) for name in find_experts(model))
    return {
        f"{stack}.{child}": layer
        for stack in stacks
        if stack is not None
        for child, layer in model.get_submodule(stack).named_children()
    }


def _stack_of(model: nn.Module, name: str) -> str | None:
    """Module path of the outermost ModuleList around a module; None if there is none."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((prefix for prefix in prefixes if isinstance(model.get_submodule(prefix), nn.ModuleList)), None)

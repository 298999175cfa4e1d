"""Replace the experts that a router of stock transformers chose, in whatever form the architecture passes them on.

Every function hooks one module (torch's own hooks) and returns the handle that removes the hook. Most architectures
pass a routing on as ids, which are simply replaced; some pass it on in a form of their own. The router still runs. The
weight of its first choice goes to the first replacement, and so on. Stock is never asked for an expert that was not
chosen, except where its own forward runs one with weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offmoe.errors import ConfigError

Choose = Callable[[Tensor], Tensor]
"""Takes the routed ids, int [T, k], and returns the ids to compute with, of the same shape, dtype and device. A
negative id stands for no expert."""


def ids_argument(module: nn.Module, choose: Choose) -> RemovableHandle:
    """Hook an experts module that gets ids, int [T, k], as its second argument or as `top_k_index`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ConfigError(f"the routing of {type(module).__name__} cannot be replaced: it gets no expert ids.")
        if "top_k_index" in kwargs:
            return args, {**kwargs, "top_k_index": choose(ids)}
        return (args[0], choose(ids), *args[2:]), kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def scores(router: nn.Module, choose: Choose, ids_of: Callable[[Sequence[Tensor]], Tensor]) -> RemovableHandle:
    """Hook a router (Llama4Router) that returns scores [T, E], zero except for the chosen experts, and logits [T, E].

    Args:
        router: the module to hook.
        choose: replaces the ids.
        ids_of: takes the router's outputs and returns the ids that it chose, best first, int [T, k].
    """

    def hook(_: nn.Module, __: object, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        routed_scores, logits = outputs  # stock computes nothing from the logits
        routed = ids_of(outputs)  # [T, k]
        weights = routed_scores.gather(1, routed)  # [T, k]
        return torch.zeros_like(routed_scores).scatter_(1, choose(routed), weights), logits

    return router.register_forward_hook(hook)


def sorted_pairs(router: nn.Module, choose: Choose) -> RemovableHandle:
    """Hook a router (JetMoeTopKGating) that returns all (token, expert) pairs sorted by expert, with counts."""

    def hook(module: Any, _: object, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        index, _, gates, _, logits = outputs  # pairs [T * k] by expert; their gates [T * k]; logits [T, E]
        top_k, num_experts = int(module.top_k), int(module.num_experts)
        routed = logits.topk(top_k, dim=1).indices  # [T, k], as the router chose
        weights = torch.empty_like(gates).scatter_(0, index, gates)  # [T * k] in the order of the choices
        experts, index = choose(routed).flatten().sort(stable=True)  # [T * k] each
        sizes = torch.bincount(experts, minlength=num_experts).tolist()
        return index, index // top_k, weights[index], sizes, logits

    return router.register_forward_hook(hook)


def one_hot(experts: nn.Module, choose: Choose) -> RemovableHandle:
    """Hook experts (SwitchTransformersExperts) that get one-hot rows [T, 1, E]; a row of zeros means no expert."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, rows, *weights = args
        chosen = choose(ids_of_one_hot(rows.flatten(0, -2)))  # [T, 1]
        return hidden, F.one_hot(chosen + 1, rows.shape[-1] + 1)[..., 1:].to(rows.dtype), *weights

    return experts.register_forward_pre_hook(hook)


def ids_of_one_hot(rows: Tensor) -> Tensor:
    """Convert one-hot rows [T, E] to ids [T, 1]; a row of zeros becomes -1."""
    routed = rows.sum(dim=1, keepdim=True)  # [T, 1], 0 or 1
    return rows.argmax(dim=1, keepdim=True).masked_fill(routed == 0, -1)


def mask_as_ids(experts: nn.Module, choose: Choose) -> RemovableHandle:
    """Hook experts (NllbMoeExperts) that read a mask [T, E] as ids, and probabilities [T, E] as weights.

    For a choice that no expert serves, these experts run one with weight 0; the hook names one that runs anyway.
    """

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, mask, probs = args
        routed, weights = ids_of_mask(mask, probs)  # [T, 2] each
        chosen = choose(routed)
        running = chosen.amax().clamp(min=0)
        return hidden, torch.where(chosen < 0, running, chosen), weights.masked_fill(chosen < 0, 0)

    return experts.register_forward_pre_hook(hook)


def ids_of_mask(mask: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a mask [T, E] that is read as ids to (ids, weights), [T, 2] each.

    Zeros of the mask count for expert 0, ones for expert 1. An id without weight becomes -1.
    """
    weights = torch.stack([torch.where(mask == e, probs, 0).sum(dim=1) for e in (0, 1)], dim=1)
    return torch.arange(2, device=mask.device).expand(len(mask), 2).masked_fill(weights == 0, -1), weights

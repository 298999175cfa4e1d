"""Other experts than a router chose, put into the forms in which stock transformers passes a routing on.

What moves: nothing but ids. Every function hooks one module (torch's own hooks) and returns what removes the hook: a
routing that is given as ids needs no more than other ids, some architectures pass it on in a form of their own. The
router still runs, and the weight of its first choice goes to the expert that stands first now, and so on.

What it must never do: ask stock for an expert that was not chosen, but where its own forward asks in vain too.
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
"""choose(ids int [T, k] as routed) -> the ids to compute with in their place, of the same shape, dtype and device. A
negative one is nobody's."""


def ids_argument(module: nn.Module, choose: Choose) -> RemovableHandle:
    """For experts that are given their ids, int [T, k], as the second argument or as `top_k_index`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ConfigError(f"the routing of {type(module).__name__} cannot be replaced: it is given no expert ids.")
        if "top_k_index" in kwargs:
            return args, {**kwargs, "top_k_index": choose(ids)}
        return (args[0], choose(ids), *args[2:]), kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def scores(router: nn.Module, choose: Choose, ids_of: Callable[[Sequence[Tensor]], Tensor]) -> RemovableHandle:
    """For a router (Llama4Router) that gives scores [T, E], 0 but for the chosen ones, and logits [T, E].

    ids_of: its outputs -> the ids that it chose, best first. The logits stay: stock computes nothing from them.
    """

    def hook(_: nn.Module, __: object, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        given, logits = outputs
        routed = ids_of(outputs)  # [T, k]
        return torch.zeros_like(given).scatter_(1, choose(routed), given.gather(1, routed)), logits

    return router.register_forward_hook(hook)


def sorted_pairs(router: nn.Module, choose: Choose) -> RemovableHandle:
    """For a router (JetMoeTopKGating) that sorts all (token, expert) pairs by expert and says how many each gets."""

    def hook(module: Any, _: object, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        index, _, gates, _, logits = outputs  # pairs [T * k] by expert; their gates [T * k]; logits [T, E]
        top_k, num_experts = int(module.top_k), int(module.num_experts)
        routed = logits.topk(top_k, dim=1).indices  # [T, k], as the router chose
        weights = torch.empty_like(gates).scatter_(0, index, gates)  # [T * k] in the order of the choices
        experts, index = choose(routed).flatten().sort(stable=True)
        sizes = torch.bincount(experts, minlength=num_experts).tolist()
        return index, index // top_k, weights[index], sizes, logits

    return router.register_forward_hook(hook)


def one_hot(experts: nn.Module, choose: Choose) -> RemovableHandle:
    """For experts (SwitchTransformersExperts) that are given one-hot rows [T, 1, E]; nobody's is all zero."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, rows, *weights = args
        chosen = choose(ids_of_one_hot(rows.flatten(0, -2)))  # [T, 1]
        return hidden, F.one_hot(chosen + 1, rows.shape[-1] + 1)[..., 1:].to(rows.dtype), *weights

    return experts.register_forward_pre_hook(hook)


def ids_of_one_hot(rows: Tensor) -> Tensor:
    """One-hot rows [T, E] -> ids [T, 1]; -1 for a row of zeros."""
    routed = rows.sum(dim=1, keepdim=True)  # [T, 1], 0 or 1
    return rows.argmax(dim=1, keepdim=True).masked_fill(routed == 0, -1)


def mask_as_ids(experts: nn.Module, choose: Choose) -> RemovableHandle:
    """For experts (NllbMoeExperts) that take a mask [T, E] for ids, and probabilities [T, E] for their weights.

    They compute with weight 0 for nobody's choice, here an expert that is asked anyway.
    """

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, mask, probs = args
        routed, weights = ids_of_mask(mask, probs)
        chosen = choose(routed)
        asked = chosen.amax().clamp(min=0)
        return hidden, torch.where(chosen < 0, asked, chosen), weights.masked_fill(chosen < 0, 0)

    return experts.register_forward_pre_hook(hook)


def ids_of_mask(mask: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, weights) [T, 2] each of a mask taken for ids: where it is 0 for expert 0, where it is 1 for expert 1."""
    weights = torch.stack([torch.where(mask == e, probs, 0).sum(dim=1) for e in (0, 1)], dim=1)
    return torch.arange(2, device=mask.device).expand(len(mask), 2).masked_fill(weights == 0, -1), weights

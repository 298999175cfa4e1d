"""Attention of one new token on a CPU (`exactness="numeric"`): heads that share a key are rows of one product.

torch takes the heads of a query one by one and prepares the keys of their group for each. With 32 heads in 4 groups and
1,000 tokens in the cache that takes 6.7 ms per layer on one core of a Zen 4, where the same heads as rows take 0.35 ms
(`tools/bench/attention.py`). Sums run in another order, so bits differ.

Moves: the keys and values of a layer through the caches of a core, once.
Bound: memory bandwidth.
Must never: compute what stock's function would not: whatever is not one plain token goes to it.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from offmoe.hf.upstream import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS

STOCK, IMPLEMENTATION = "sdpa", "offmoe_sdpa"
COMPARISON = re.compile(r"_attn_implementation\s*(?:==|!=|in\b|not\s+in\b)")
"""Code that does something else for implementations by name."""
NOT_PLAIN = ("position_bias", "cache", "softcap")
"""Arguments that change what is computed, unless they are None."""


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered function, as transformers calls one.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, width]. key: [batch, groups, T, width]. value: [batch, groups, T, values].
        attention_mask: [batch, 1 or heads, tokens, T], or None.
        dropout: of probabilities, in training.
        scaling: of scores.
        kwargs: what the layer gives besides.

    Returns:
        [batch, tokens, heads, values], and no probabilities.
    """
    batch, heads, tokens, _ = query.shape
    groups = key.shape[1]
    is_plain = (
        tokens == 1 and groups < heads and not dropout and (attention_mask is None or attention_mask.shape[1] == 1)
    )
    if not is_plain or any(kwargs.get(name) is not None for name in NOT_PLAIN):
        stock = ALL_ATTENTION_FUNCTIONS[STOCK]
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    rows = query.reshape(batch, groups, heads // groups, -1)  # [batch, groups, heads of a group, width]
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])


def group_heads(model: PreTrainedModel) -> bool:
    """Let the decoder's attention compute so, if it is stock's by `sdpa` and the model's code does not ask which it is.

    Returns:
        Whether it does.
    """
    if model.config.is_encoder_decoder:
        return False
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != STOCK or _compares(model):
        return False
    config._attn_implementation = IMPLEMENTATION
    return True


def _compares(model: PreTrainedModel) -> bool:
    """Whether the code of a model's layers compares names of implementations. Code that cannot be read may do so."""
    modules = {type(module).__module__ for module in model.modules()}
    for name in modules:
        if name.startswith(("torch.", "offmoe.")):
            continue
        try:
            code = inspect.getsource(sys.modules[name])
        except (OSError, TypeError, KeyError):
            return True
        if COMPARISON.search(code):
            return True
    return False

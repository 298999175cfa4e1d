"""One forward pass for the next token of many sequences, whose caches are one padded cache.

The pass gives other last bits than a pass for each sequence, because matrix products of more rows add in another order.
Sequences end at the same column of the cache: shorter ones are padded on the left, and a mask hides the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from offmoe.hf.upstream import cache_layer_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = frozenset(("input_ids", "past_key_values", "attention_mask", "position_ids", "logits_to_keep"))
"""Arguments of a forward pass that `Merged` can join."""
KINDS = frozenset(("full_attention", "sliding_attention"))


class _Length(DynamicLayer):
    """The length of a sequence whose keys and values are in a padded cache."""

    def __init__(self, length: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def can_merge(model: PreTrainedModel) -> bool:
    """Whether caches of sequences can be padded and joined: every layer keeps all of its tokens, or a window of them.

    Linear attention, sparse attention with an index, and models whose positions are not plain numbers cannot.
    """
    text = model.config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=text).layers
        kinds = {kind for kind, _ in cache_layer_types(text)}
    except Exception:  # a configuration that the cache does not know
        return False
    is_plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return is_plain and kinds <= KINDS and text is model.config and bool(layers)


def is_decoding(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward pass computes the next token of one sequence, with nothing that `Merged` does not know."""
    ids, positions = arguments.get("input_ids"), arguments.get("position_ids")
    cache: Any = arguments.get("past_key_values")
    # Flags are those of generate, the same for all rows.
    asked = {name for name, value in arguments.items() if value is not None and not isinstance(value, bool)}
    return (
        asked <= INPUTS
        and not arguments.get("output_hidden_states")
        and not arguments.get("output_attentions")
        and isinstance(ids, torch.Tensor)
        and ids.shape == (1, 1)
        and isinstance(positions, torch.Tensor)
        and positions.shape == (1, 1)
        and type(cache) is DynamicCache
        and cache.get_seq_length() > 0
    )


class Merged:
    """The padded cache of sequences that are being decoded, and their passes.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._text = model.config.get_text_config(decoder=True)
        self._members: list[DynamicCache] = []
        """What each row of the cache belongs to: the sequence's own cache, which holds no keys while it is here."""
        self._lengths: list[int] = []
        """Tokens of each row."""
        self._cache = DynamicCache(config=self._text)
        self.order: list[int] = []
        """Which of the passes each row of the cache belongs to."""

    @property
    def columns(self) -> int:
        """Tokens of the longest row."""
        return max(self._lengths, default=0)

    def forward(self, passes: Sequence[Mapping[str, Any]]) -> list[CausalLMOutputWithPast]:
        """Compute the passes of sequences together.

        Args:
            passes: Arguments of each sequence's forward pass; all satisfy `is_decoding`.

        Returns:
            The output of each: logits [1, 1, vocabulary], and its cache.
        """
        owners = [cast("DynamicCache", arguments["past_key_values"]) for arguments in passes]
        self._keep([i for i, member in enumerate(self._members) if any(member is owner for owner in owners)])
        self._add([owner for owner in owners if not any(member is owner for member in self._members)])
        order = [next(i for i, owner in enumerate(owners) if owner is member) for member in self._members]
        self.order = order
        ids = torch.cat([passes[i]["input_ids"] for i in order])  # [rows, 1]
        positions = torch.cat([passes[i]["position_ids"] for i in order])  # [rows, 1]
        columns = torch.arange(self.columns + 1, device=ids.device)  # [columns + 1]
        first = torch.tensor([self.columns - length for length in self._lengths], device=ids.device)  # [rows]
        mask = (columns >= first[:, None]).long()  # [rows, columns + 1]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        )
        for row, member in enumerate(self._members):
            self._lengths[row] += 1
            for layer in member.layers:
                cast("_Length", layer).length += 1
        rows = {i: output.logits[row : row + 1] for row, i in enumerate(order)}
        return [CausalLMOutputWithPast(logits=rows[i], past_key_values=owners[i]) for i in range(len(owners))]

    def _keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the columns that are padding in all of them."""
        if len(rows) == len(self._members):
            return
        self._members = [self._members[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._cache = DynamicCache(config=self._text)
            return
        index = torch.tensor(rows, device=self._model.device)
        for layer in self._layers(self._cache):
            self._fill(layer, layer.keys.index_select(0, index), layer.values.index_select(0, index))

    def _add(self, newcomers: Sequence[DynamicCache]) -> None:
        """Take over the keys and values of sequences."""
        if not newcomers:
            return
        self._lengths += [cache.get_seq_length() for cache in newcomers]
        sources = [*([self._cache] if self._members else []), *newcomers]
        self._members += newcomers
        width = self.columns
        for index, layer in enumerate(self._layers(self._cache)):
            parts = [self._layers(source)[index] for source in sources]
            keys = torch.cat([_columns(part.keys, width) for part in parts])  # [rows, heads, columns, size]
            values = torch.cat([_columns(part.values, width) for part in parts])
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            self._fill(layer, keys, values)
        for cache in newcomers:
            length = cache.get_seq_length()
            cache.layers = [_Length(length) for _ in cache.layers]

    def _layers(self, cache: DynamicCache) -> list[Any]:
        """The layers of a cache; `can_merge` has seen that all have keys and values."""
        return cache.layers

    def _fill(self, layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Let a layer of the cache hold these, without columns that its mask does not count."""
        columns = self.columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = columns
            columns = min(columns, layer.sliding_window - 1)
        layer.keys, layer.values = keys[:, :, keys.shape[2] - columns :], values[:, :, values.shape[2] - columns :]


def _columns(part: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, heads, n, size] -> [rows, heads, at least width, size], padded on the left."""
    return pad(part, (0, 0, max(0, width - part.shape[2]), 0))

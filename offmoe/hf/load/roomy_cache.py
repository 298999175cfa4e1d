"""Keys and values that grow in place on a CPU (`exactness="numeric"`).

transformers' `DynamicLayer` joins the keys of before and the new ones in new memory, for every token. At 4,000 tokens
that took 200 of 250 ms per token (8 layers of Qwen3's shape, 8 key heads), most of it page faults. Here a layer has
room for some tokens more, and its keys are a view of the part that is used.

Moves: a new token's keys and values into the room; everything once whenever the room is used up.
Bound: memory bandwidth.
Must never: write where a tensor may look that somebody else was given. Room is used only while the layer holds the very
view that it was given last; who crops, reorders or replaces keys gets a layer without room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM_BYTES = 4 << 20
"""Most bytes of unused room in all layers of a cache. Workspace that prompts need covers it while single tokens run."""
MOST_TOKENS = 128
"""Tokens of room at most."""
NAMES = ("keys", "values")


class Room(NamedTuple):
    """Memory for more tokens than there are."""

    memory: torch.Tensor
    """[batch, heads, tokens that fit, width]."""
    used: torch.Tensor
    """The view of it that the layer holds."""


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose tensors have room."""

    num_layers: int
    """Layers of the cache, which share ROOM_BYTES."""
    rooms: dict[str, Room]
    """The room of keys, and that of values, by name."""

    @classmethod
    def of(cls, layer: DynamicLayer, num_layers: int) -> RoomyLayer:
        """A layer with the state of another, which is not used any more. num_layers: of its cache."""
        roomy = cls.__new__(cls)
        roomy.__dict__.update(vars(layer), num_layers=num_layers, rooms={})
        return roomy

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `DynamicLayer.update`: [batch, heads, tokens, width] behind what is there."""
        new = (key_states, value_states)
        memory = self.claim(*new) if key_states.shape[-2] == 1 else None
        if memory is None:
            self.rooms.clear()
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.get_seq_length()
        for room, states in zip(memory, new, strict=True):
            room[..., length : length + 1, :] = states
        self.extend(*memory)
        return self.keys, self.values

    def claim(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Memory that holds all keys and values and has room for one token more: [batch, heads, room, width] each.

        Args:
            key, value: [batch, heads, 1, width], of the dtype and shape that the token's will have.

        Returns:
            Memory of keys and of values, for `extend`; None if nothing can be written behind what is held.
        """
        pairs = [(held, new) for held, new in ((self.keys, key), (self.values, value)) if held is not None]
        if len(pairs) < 2 or not all(_joins(held, new) for held, new in pairs):
            return None
        token_bytes = self.num_layers * sum(new.nbytes for _, new in pairs)
        room = max(1, min(MOST_TOKENS, ROOM_BYTES // token_bytes))
        keys, values = (self._room(name, held, room) for name, (held, _) in zip(NAMES, pairs, strict=True))
        return keys, values

    def _room(self, name: str, held: torch.Tensor, room: int) -> torch.Tensor:
        length, known = held.shape[-2], self.rooms.get(name)
        if known is not None and known.used is held and length < known.memory.shape[-2]:
            return known.memory
        memory = held.new_empty(*held.shape[:-2], length + room, held.shape[-1])
        memory[..., :length, :] = held
        return memory

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold one token more: its key and value stand in memory that `claim` gave, behind the others."""
        length = self.get_seq_length() + 1
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        self.rooms = dict(zip(NAMES, (Room(keys, self.keys), Room(values, self.values)), strict=True))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self.rooms.clear()
        super().crop(*args, **kwargs)

    def reset(self) -> None:
        self.rooms.clear()
        super().reset()


GROWING = (DynamicLayer, RoomyLayer)
"""The kinds of layers that keep every token, and nothing else."""


def _joins(held: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether new states can be written behind held ones, so that torch.cat would give the same."""
    return (
        held.ndim == new.ndim == 4
        and held.dtype == new.dtype
        and held.device == new.device
        and held.shape[:2] == new.shape[:2]
        and held.shape[-1] == new.shape[-1]
        and not (torch.is_grad_enabled() and (held.requires_grad or new.requires_grad))
        and not (held.is_inference() and not torch.is_inference_mode_enabled())
    )


def give_room(cache: object) -> None:
    """Let a cache of plain growing layers grow in place from now on; other caches stay as they are."""
    if type(cache) is not DynamicCache:
        return
    layers: list[Any] = cache.layers
    for at, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[at] = RoomyLayer.of(layer, len(layers))


def without_room(layers: Sequence[Any]) -> None:
    """Give back the unused room of layers."""
    for layer in layers:
        rooms = getattr(layer, "rooms", None)
        if rooms:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            rooms.clear()

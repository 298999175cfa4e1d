"""KV caches that outlive their answer, so that the next turn of a conversation does not compute the first again.

In the mode "exact" a prompt is always prefilled in chunks of C tokens, and only whole chunks of prefilled tokens are
kept. The answer is then bit-equal to one without reuse, and to transformers' `generate(prefill_chunk_size=C)`. In the
mode "numeric" everything is kept; other roundings change the last bits of logits.

What is kept and what runs share the context that the memory plan reserves.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from offmoe.hf.load.roomy_cache import GROWING, without_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT, NUMERIC, OFF = "exact", "numeric", "off"
MODES = (EXACT, NUMERIC, OFF)
CROP, SNAPSHOT, NOTHING = "crop", "snapshot", "nothing"

NO_CONTINUATION = {
    "jamba": "its layers go on with one token at a time only",
    "deepseek_v32": "its sparse attention chooses other tokens than without a cache",
    "glm_moe_dsa": "its sparse attention chooses other tokens than without a cache",
    "axk2": "its sparse attention chooses other tokens than without a cache",
    "dots3_note": "its sparse attention chooses other tokens than without a cache",
    "hy_v4": "its sparse attention chooses other tokens than without a cache",
    "mistral_large4": "its sparse attention chooses other tokens than without a cache",
    "unlimited_ocr": "its attention differs with a cache",
    "minimax": "it takes a cache of its own kind only",
    "diffusion_gemma": "it generates blocks, not tokens",
    "qwen3_omni_moe_thinker": "its positions are not counted by the cache",
}
"""Model types whose answer would change if a prompt went on from a cache, each with why. Measured on tiny models."""


def reuse_kind(model: PreTrainedModel) -> str:
    """How caches of a model can be kept: CROP to any length, SNAPSHOT at one length, or NOTHING.

    Windows and linear attention forget, so their caches cannot be cropped; a copy of the state can be kept.
    """
    if model.config.is_encoder_decoder or model.config.model_type in NO_CONTINUATION:
        return NOTHING
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception:  # a configuration that the cache does not know
        return NOTHING
    return CROP if all(type(layer) is DynamicLayer for layer in layers) else SNAPSHOT


@dataclass
class Kept:
    """A cache and the token ids that it holds."""

    ids: tuple[int, ...]
    cache: DynamicCache


class KeptCaches:
    """Caches of finished answers, and the tokens of running ones, in one budget. The least recently used goes first.

    Not for several threads at once.

    Args:
        limit: Tokens that kept and running caches may hold together.
        chunk: C; reuse begins at multiples of it in the mode "exact".
        mode: EXACT, NUMERIC or OFF.
        kind: CROP, SNAPSHOT or NOTHING.
    """

    def __init__(self, limit: int, chunk: int, mode: str, kind: str):
        self.limit, self.chunk = limit, chunk
        self.mode = OFF if kind == NOTHING else mode
        self._kind = kind
        self._kept: list[Kept] = []
        """The most recently used last."""
        self.running = 0
        """Tokens reserved by running answers."""

    @property
    def kept(self) -> int:
        """Tokens of kept caches."""
        return sum(len(kept.ids) for kept in self._kept)

    @property
    def conversations(self) -> int:
        """Number of kept caches."""
        return len(self._kept)

    def has_room(self, tokens: int) -> bool:
        """Whether an answer of so many tokens, prompt included, fits beside the running ones."""
        return self.running + tokens <= self.limit

    def begin(self, ids: Sequence[int], tokens: int) -> Kept | None:
        """Reserve room for an answer and take the cache that holds the longest beginning of its prompt.

        Args:
            ids: The prompt.
            tokens: Tokens of prompt and answer.

        Returns:
            The beginning, for the answer alone; None: nothing is reused.
        """
        assert self.has_room(tokens)
        self.running += tokens
        best, length = self._longest(ids)
        self._make_room(spare=best)
        if best is None:
            return None
        lost = len(best.ids) - length
        if lost == 0 or self.running + self.kept > self.limit:
            self._remove(best)
            self._make_room(spare=None)
            cache = best.cache
        else:
            self._touch(best)
            cache = copy.deepcopy(best.cache)
        if self._kind == CROP:
            crop(cache, length)
        return Kept(tuple(ids[:length]), cache)

    def boundary(self, prompt_tokens: int) -> int:
        """Length of the beginning of a prompt that is kept after its answer; 0: nothing is."""
        if self.mode == OFF:
            return 0
        if self.mode == NUMERIC and self._kind == CROP:
            return prompt_tokens
        return prompt_tokens // self.chunk * self.chunk

    @property
    def needs_snapshot(self) -> bool:
        """Whether the state at `boundary` has to be copied while the answer runs."""
        return self.mode != OFF and self._kind == SNAPSHOT

    def end(self, tokens: int, kept: Kept | None) -> None:
        """Give back the room of an answer, and keep what it computed.

        Args:
            tokens: As given to `begin`.
            kept: The cache to keep, cropped to its ids; None: nothing.
        """
        self.running -= tokens
        if self.mode == OFF or kept is None or not kept.ids:
            return
        for other in list(self._kept):  # the beginning of what is kept now, or the same
            if kept.ids[: len(other.ids)] == other.ids:
                self._remove(other)
        self._kept.append(kept)
        self._make_room(spare=None)

    def clear(self) -> None:
        """Forget all kept caches."""
        self._kept.clear()

    def _longest(self, ids: Sequence[int]) -> tuple[Kept | None, int]:
        """The kept cache of which most can be reused for a prompt, and how many tokens those are."""
        best, most = None, 0
        for kept in self._kept:
            length = min(common(kept.ids, ids), len(ids) - 1)  # one token has to be computed
            if self.mode == EXACT:
                length = length // self.chunk * self.chunk
            if self._kind == SNAPSHOT and length < len(kept.ids):
                continue
            if length > most:
                best, most = kept, length
        return best, most

    def _make_room(self, spare: Kept | None) -> None:
        for kept in list(self._kept):
            if self.running + self.kept <= self.limit:
                return
            if kept is not spare:
                self._remove(kept)

    def _remove(self, kept: Kept) -> None:
        self._kept = [other for other in self._kept if other is not kept]

    def _touch(self, kept: Kept) -> None:
        self._remove(kept)
        self._kept.append(kept)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def crop(cache: DynamicCache, length: int) -> bool:
    """Shorten every layer of a cache to `length` tokens; False if it cannot be done.

    After a pass that was broken off, layers differ in length, so each is cropped by its own excess.
    """
    layers: list[Any] = cache.layers
    with torch.no_grad():
        for layer in layers:
            excess = layer.get_seq_length() - length
            if excess < 0 or (excess > 0 and type(layer) not in GROWING):
                return False
            if excess:
                layer.crop(-excess)
                # Views would keep the memory of what was cropped.
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        without_room(layers)
    return True

"""Perplexity of models on a text, in windows, and how far their predictions are apart.

What moves: every window through every model once; computing bounds it, or the experts' way to the device. The second
half of every window is scored, so that each scored token has at least half a window of context; windows overlap by
half, so each token but those of the first half is scored once. Must never score a token twice or load a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from offmoe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW, BATCH = 512, 8


class Score(NamedTuple):
    """Perplexity; mean divergence KL(first model, this) in nats per token, which chance moves less; tokens scored."""

    perplexity: float
    divergence: float
    tokens: int


def windows(ids: torch.Tensor, length: int = WINDOW) -> torch.Tensor:
    """Token ids [T] -> [n, length] that overlap by half; what is left at the end is left out.

    A text shorter than that is one window. ConfigError if it has fewer than two tokens.
    """
    if len(ids) < 2:
        raise ConfigError(
            f"the text has {len(ids)} tokens; perplexity needs two at least, and means something from 10,000"
        )
    length = min(length, len(ids))
    return ids.unfold(0, length, max(1, length // 2))


@torch.inference_mode()
def scores(
    models: Mapping[str, PreTrainedModel],
    ids: torch.Tensor,
    batch: int = BATCH,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Score]:
    """All models on the same windows [n, length]; the first is what divergence is measured from.

    progress(done, total): windows.
    """
    losses, divergences, scored = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0), 0
    half = ids.shape[1] - ids.shape[1] // 2
    for number, rows in enumerate(ids.split(batch)):
        targets = rows[:, half:].flatten()
        first: torch.Tensor | None = None
        for name, model in models.items():
            logits = model(rows.to(model.device)).logits[:, half - 1 : -1]
            logs = logits.flatten(0, 1).float().log_softmax(-1).cpu()  # [batch * length / 2, vocabulary]
            first = logs if first is None else first
            losses[name] += F.nll_loss(logs, targets, reduction="sum").item()
            divergences[name] += F.kl_div(logs, first, reduction="sum", log_target=True).item()
        scored += targets.numel()
        progress(min((number + 1) * batch, len(ids)), len(ids))
    return {name: Score(math.exp(losses[name] / scored), divergences[name] / scored, scored) for name in models}

"""Computes the perplexity of models on a text, and how far their predictions are apart.

The text is cut into windows that overlap by half. Only the second half of a window is scored, so each scored token has
at least half a window of context. Every token is scored once, except those of the first half window. Every window runs
through every model once. This module loads no model.
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
    """The score of one model.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token.
        divergence: mean KL(first model, this model) in nats per token. Chance moves it less than perplexity.
        tokens: number of scored tokens.
    """

    perplexity: float
    divergence: float
    tokens: int


def windows(ids: torch.Tensor, length: int = WINDOW) -> torch.Tensor:
    """Cut token ids [T] into windows [n, length] that overlap by half. An incomplete window at the end is dropped.

    A text shorter than `length` is one window. Raises ConfigError if it has fewer than two tokens.
    """
    if len(ids) < 2:
        raise ConfigError(
            f"the text has {len(ids)} tokens; perplexity needs at least two, and is meaningful from about 10,000"
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
    """Score all models on the same windows.

    Args:
        models: by name. Divergence is measured from the first.
        ids: token ids [n, length] from `windows`.
        batch: windows per forward pass.
        progress: called with (windows done, all windows).

    Returns:
        A score for each model, by name.
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

"""Every token is scored once, with half a window before it, and the first model is the measure of the others."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offmoe.errors import ConfigError
from offmoe.measure.perplexity import scores, windows

VOCABULARY = 7


class Bigram:
    """Logits that depend on the token before, and nothing else."""

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids])


def text(tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))


def test_windows_overlap_by_half() -> None:
    found = windows(torch.arange(20), 8)
    assert found.tolist() == [list(range(start, start + 8)) for start in (0, 4, 8, 12)]
    assert windows(torch.arange(5), 8).tolist() == [[0, 1, 2, 3, 4]]
    assert windows(torch.arange(2)).tolist() == [[0, 1]]
    for tokens in (0, 1):
        with pytest.raises(ConfigError, match=f"the text has {tokens} tokens"):
            windows(torch.arange(tokens))


@pytest.mark.parametrize(("tokens", "length"), [(20, 8), (21, 7), (5, 8), (2, 8)])
def test_scores_are_those_of_every_token_once(tokens: int, length: int) -> None:
    ids = text(tokens)
    models: dict[str, Any] = {"a": Bigram(1), "b": Bigram(2)}
    cut, seen = windows(ids, length), []
    found = scores(models, cut, batch=3, progress=lambda *at: seen.append(at))
    first = cut.shape[1] - cut.shape[1] // 2
    last = cut.shape[1] + (len(cut) - 1) * (cut.shape[1] // 2)
    logs = {name: model.table[ids[first - 1 : last - 1]].log_softmax(-1) for name, model in models.items()}
    for name, log in logs.items():
        loss = -log.gather(1, ids[first:last, None]).mean()
        assert found[name].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        divergence = (logs["a"].exp() * (logs["a"] - log)).sum(-1).mean()
        assert found[name].divergence == pytest.approx(float(divergence), rel=1e-4, abs=1e-7)
        assert found[name].tokens == last - first
    assert seen[-1] == (len(cut), len(cut))

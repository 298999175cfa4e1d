"""How tokens are chosen: OpenAI's penalties, transformers' settings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.sampling import Sampling, end_tokens
from tests import tiny


def test_penalties_follow_the_formula() -> None:
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 7.0, 99: 1.0})
    (processor,) = sampling.processors(prompt_tokens=2)
    ids = torch.tensor([[1, 1]])  # the prompt, which does not count
    scores = torch.zeros(1, 5)
    assert processor(ids, scores).tolist() == [[0, 0, 0, 7, 0]]
    ids = torch.tensor([[1, 1, 2, 4, 2]])
    assert processor(ids, scores).tolist() == [[0, 0, -1.25, 7, -0.75]]
    assert scores.eq(0).all()  # transformers' own are not changed


def test_nothing_to_change_is_no_processor() -> None:
    assert Sampling().processors(3) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.5),
        ("min_p", -1),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("repetition_penalty", 0),
        ("logprobs", 21),
        ("max_tokens", 0),
        ("seed", 1 << 64),
    ],
)
def test_an_impossible_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as refused:
        Sampling(**{name: value}).check()
    assert refused.value.param == name


def model_with(**settings: Any) -> Any:
    model = tiny.build("mixtral")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def test_a_request_wins_over_the_models_settings() -> None:
    model = model_with(do_sample=False, temperature=1.0, eos_token_id=[1, 2], num_beams=4, num_return_sequences=2)
    config = Sampling(temperature=0.7, top_p=0.9, top_k=-1).generation_config(model, 5)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.7, 0.9, None)
    assert (config.max_new_tokens, config.num_beams, config.num_return_sequences) == (5, 1, 1)
    assert config.eos_token_id == [1, 2]
    assert end_tokens(model) == {1, 2}
    assert model.generation_config.num_beams == 4  # the model's own stays


def test_zero_is_greedy_and_silence_is_the_models_choice() -> None:
    model = model_with(do_sample=True, temperature=0.6, top_p=0.8)
    assert Sampling(temperature=0).generation_config(model, 1).do_sample is False
    config = Sampling().generation_config(model, 1)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.6, 0.8)

"""The engine: its answers are those of generate, whatever was cached, runs beside them or was cancelled before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from offmoe.compute.kernels.library import status
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.render import Prompt
from offmoe.dialogue.sampling import Sampling
from offmoe.errors import ConfigError, OffmoeError
from offmoe.serve.engine import Engine, QueueFullError
from offmoe.serve.job import CANCELLED, LENGTH, STOP, Began, Job, Request
from tests import families, tiny
from tests.chat_demo import (
    Listening,
    ask,
    calls_of,
    ended,
    held_until_cancelled,
    prompt_of,
    reasoning_of,
    saying,
    text_of,
)
from tests.doubles import wait_until
from tests.hf.load.test_token_layers import calls, ready  # noqa: F401

TURNS = ("And the LORD said unto Moses, " * 10, "Who is he? " * 9, "Tell me of the people of Israel.", "Of the land?")
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}


def scores_of(updates: Any) -> list[tuple[int, float]]:
    return [(s.token, s.logprob) for update in updates for s in getattr(update, "scores", ())]


def conversation(engine: Engine, **sampling: Any) -> list[tuple[list[tuple[int, float]], int]]:
    """(log-probabilities of the answer, tokens reused) of each turn."""
    told: list[str] = []
    found = []
    for turn in TURNS:
        told.append(turn)
        updates = ask(engine, prompt_of(engine.tokenizer, *told), **{**GREEDY, "logprobs": 0, **sampling})
        found.append((scores_of(updates), ended(updates).usage.cached))
        told.append(text_of(updates))
    return found


def test_exact_reuse_gives_the_bits_of_no_reuse_and_of_stock(loaded: tuple[Any, Any], chat_folder: Any) -> None:
    model, tokenizer = loaded
    with Engine(model, tokenizer, prefix_reuse="exact", prefill_chunk=64) as engine:
        reused = conversation(engine)
    with Engine(model, tokenizer, prefix_reuse="off", prefill_chunk=64) as engine:
        alone = conversation(engine)
    assert [scores for scores, _ in reused] == [scores for scores, _ in alone]
    cached = [count for _, count in reused]
    assert cached[0] == 0
    assert cached == sorted(cached)
    assert cached[-1] >= 128
    assert all(count % 64 == 0 for count in cached)
    assert not any(count for _, count in alone)

    stock: Any = AutoModelForCausalLM.from_pretrained(chat_folder).requires_grad_(False)
    prompt = torch.tensor([prompt_of(tokenizer, TURNS[0]).ids])
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    out = stock.generate(prompt, max_new_tokens=24, prefill_chunk_size=64, **options)
    expected = torch.log_softmax(torch.stack(out.logits)[:, 0].float(), dim=-1)
    tokens = out.sequences[0, prompt.shape[1] :]
    assert reused[0][0] == [(int(t), float(expected[i, t])) for i, t in enumerate(tokens)]


def test_numeric_reuse_keeps_the_answer_too(loaded: tuple[Any, Any]) -> None:
    with Engine(*loaded, prefix_reuse="numeric", prefill_chunk=64) as engine:
        numeric = [count for _, count in conversation(engine)]
    with Engine(*loaded, prefix_reuse="exact", prefill_chunk=64) as engine:
        exact = [count for _, count in conversation(engine)]
    assert numeric[0] == 0
    assert all(more > fewer for more, fewer in zip(numeric[1:], exact[1:], strict=True))


@pytest.mark.parametrize(("mode", "largest"), [("numeric", 1000), ("exact", 8)])
def test_a_prompt_passes_whole_where_only_last_bits_depend_on_it(
    loaded: tuple[Any, Any], mode: str, largest: int
) -> None:
    prompt = prompt_of(loaded[1], TURNS[0])
    sizes = []
    with Engine(*loaded, prefix_reuse=mode, prefill_chunk=8) as engine:
        hook = engine.model.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        ask(engine, prompt, **{**GREEDY, "max_tokens": 1})
        hook.remove()
    assert sum(sizes) == len(prompt.ids)
    assert sizes[0] == min(largest, len(prompt.ids))


def test_a_title_request_between_turns_does_not_evict(engine: Engine) -> None:
    first = prompt_of(engine.tokenizer, TURNS[0])
    ask(engine, first, **GREEDY)
    ask(engine, prompt_of(engine.tokenizer, "Give this conversation a title. " * 8), **GREEDY)
    again = ask(engine, prompt_of(engine.tokenizer, TURNS[0], "yes", "and?"), **GREEDY)
    assert ended(again).usage.cached == len(first.ids) // 64 * 64 > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interleaved_answers_are_those_of_each_alone(loaded: tuple[Any, Any], temperature: float) -> None:
    prompts = [prompt_of(loaded[1], text) for text in ("In the beginning", "Blessed are", "Jesus saith unto him")]
    requests = [
        Request(prompt, Sampling(temperature=temperature, seed=7 + i, max_tokens=40, logprobs=0))
        for i, prompt in enumerate(prompts)
    ]
    with Engine(*loaded, prefill_chunk=64, prefix_reuse="off") as engine:
        alone = [scores_of(Listening(engine, request).all()) for request in requests]
    with Engine(*loaded, parallel=3, prefill_chunk=64, prefix_reuse="off") as engine, in_turns(engine) as turns:
        together = [Listening(engine, request) for request in requests]
        assert [scores_of(listening.all()) for listening in together] == alone
    changes = sum(one is not other for one, other in pairwise(turns))
    assert changes >= 2 * len(requests), "each took several turns"


@contextmanager
def in_turns(engine: Engine) -> Iterator[list[Job]]:
    """-> the job of every forward pass. The first pass waits until two other answers wait for their turn."""
    jobs: list[Job] = []

    def note(*_: object) -> None:
        if not jobs:
            wait_until(lambda: len(engine._turns._waiting) == 2)
        jobs.append(engine.running_here.job)

    hook = engine.model.register_forward_pre_hook(note)
    try:
        yield jobs
    finally:
        hook.remove()


@pytest.mark.parametrize("when", ["waiting", "prefill", "decoding"])
def test_a_cancelled_answer_frees_the_engine_and_changes_nothing(engine: Engine, when: str) -> None:
    """Each time the cancelled answer stands before a forward pass, and ends without computing a layer more."""
    prompt = prompt_of(engine.tokenizer, TURNS[0])
    expected = scores_of(ask(engine, prompt, logprobs=0, **GREEDY))
    engine.kept.clear()
    long = prompt_of(engine.tokenizer, "word " * 700 if when == "prefill" else "x")
    with held_until_cancelled(engine) as stopped:
        busy = Listening(engine, Request(long, Sampling(max_tokens=200)))
        assert stopped.wait(60)
        if when == "waiting":
            waiting = Listening(engine, Request(prompt, Sampling(max_tokens=5)))
            waiting.job.cancel()
        busy.job.cancel()
        end = ended(busy.all())
        assert end.finish == CANCELLED
        assert end.usage.completion == (0 if when == "prefill" else 3)
        if when == "waiting":
            assert ended(waiting.all()).finish == CANCELLED
    assert scores_of(ask(engine, prompt, logprobs=0, **GREEDY)) == expected


def test_reasoning_text_and_calls_are_told_apart(engine: Engine) -> None:
    said = '<think>\nhm\n</think>\n\nHello <tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    with saying(engine, said):
        updates = ask(engine, prompt_of(engine.tokenizer, "hi"), max_tokens=100)
    assert (reasoning_of(updates), text_of(updates), calls_of(updates)) == ("\nhm\n", "Hello", [("f", {"a": [1]})])
    assert ended(updates).finish == STOP
    assert ended(updates).usage.reasoning > 0


def test_a_stop_string_and_a_limit_end_an_answer(engine: Engine) -> None:
    prompt = prompt_of(engine.tokenizer, "hi")
    with saying(engine, "one two three"):
        request = Request(prompt, Sampling(max_tokens=50), stops=["two"])
        updates = Listening(engine, request).all()
        assert (text_of(updates), ended(updates).finish, ended(updates).stop) == ("one ", STOP, "two")
        limited = ask(engine, prompt, max_tokens=2)
    assert (ended(limited).finish, ended(limited).usage.completion) == (LENGTH, 2)


def test_one_call_ends_the_answer_if_asked(engine: Engine) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
    with saying(engine, call * 3):
        request = Request(prompt_of(engine.tokenizer, "hi"), Sampling(max_tokens=200), one_call=True)
        assert calls_of(Listening(engine, request).all()) == [("f", {})]


def test_the_same_seed_gives_the_same_answer(engine: Engine) -> None:
    prompt = prompt_of(engine.tokenizer, "hi")
    sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": 20, "logprobs": 0}
    first, second, other = (scores_of(ask(engine, prompt, seed=seed, **sampling)) for seed in (1, 1, 2))
    assert first == second != other


def test_a_prompt_beyond_the_context_is_refused_and_an_answer_is_clamped(engine: Engine) -> None:
    long = Prompt("", tuple([5] * 1024))
    with pytest.raises(RequestError, match="1024 tokens, and memory is reserved for 1024") as refused:
        ask(engine, long)
    assert refused.value.code == "context_length_exceeded"
    almost = ended(ask(engine, Prompt("", tuple([5] * 1020)), is_chat=False, max_tokens=32000, temperature=0.0))
    assert (almost.finish, almost.usage.completion) in {(LENGTH, 5), (STOP, almost.usage.completion)}


def test_a_full_queue_says_when_to_come_back(loaded: tuple[Any, Any]) -> None:
    with Engine(*loaded, queue=1, prefill_chunk=64) as engine:
        request = Request(prompt_of(engine.tokenizer, "x"), Sampling(max_tokens=300))
        busy = [Listening(engine, request)]
        assert isinstance(busy[0].updates.get(timeout=30), Began)
        busy.append(Listening(engine, request))
        with pytest.raises(QueueFullError) as refused:
            Listening(engine, request)
        assert (refused.value.status, refused.value.retry_s > 0) == (429, True)
        for listening in busy:
            listening.job.cancel()


def test_nobody_else_may_generate_while_the_engine_is_open(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    ids = torch.tensor([[5, 6]])
    with Engine(*loaded), pytest.raises(OffmoeError, match="already generating"):
        model.generate(ids, max_new_tokens=2)
    assert model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 4)


def test_closing_cancels_what_runs_and_leaves_no_thread(loaded: tuple[Any, Any]) -> None:
    before = set(threading.enumerate())
    engine = Engine(*loaded, parallel=2)
    requests = [Request(prompt_of(engine.tokenizer, "x"), Sampling(max_tokens=500)) for _ in range(4)]
    listening = [Listening(engine, request) for request in requests]
    assert isinstance(listening[0].updates.get(timeout=30), Began)
    engine.close()
    assert {ended(one.all()).finish for one in listening} == {CANCELLED}
    assert set(threading.enumerate()) == before
    with pytest.raises(RequestError, match="shutting down"):
        engine.submit(listening[0].job)


def test_impossible_options_are_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="prefix_reuse='all' must be one of exact, numeric, off, auto"):
        Engine(*loaded, prefix_reuse="all")
    with pytest.raises(ConfigError, match="parallel=0"):
        Engine(*loaded, parallel=0)


REUSING = {
    "mixtral": "crop",
    "qwen3_moe": "crop",
    "gpt_oss": "snapshot",
    "qwen3_next": "snapshot",
    "granitemoehybrid": "snapshot",
    "jamba": "nothing",
    "deepseek_v3": "crop",
}


@pytest.mark.parametrize("family", REUSING)
def test_every_kind_of_cache_is_reused_bit_by_bit_or_not_at_all(family: str, tmp_path: Any) -> None:
    import offmoe

    tiny.save(families.build(family), tmp_path)
    model = offmoe.from_pretrained(tmp_path, device="cpu", slots_per_layer=3, max_context=256)
    tokenizer = _Numbers()
    first = tuple(torch.randint(2, 60, (40,), generator=torch.Generator().manual_seed(1)).tolist())
    second = (*first, *range(3, 20))
    with model.offload:
        found = {}
        for mode in ("exact", "off"):
            with Engine(model, tokenizer, prefix_reuse=mode, prefill_chunk=8) as engine:  # type: ignore[arg-type]
                assert engine.reuse_kind == REUSING[family]
                for ids in (first, second):
                    updates = ask(engine, Prompt("", ids), is_chat=False, temperature=0.0, max_tokens=6, logprobs=0)
                    found[mode, len(ids)] = scores_of(updates)
                cached = ended(updates).usage.cached
                assert cached == (40 if mode == "exact" and REUSING[family] != "nothing" else 0)
    assert found["exact", len(second)] == found["off", len(second)]


class _Numbers:
    """A tokenizer whose tokens are numbers."""

    chat_template = None

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def test_answers_compute_many_layers_in_one_call(tmp_path: Path, calls: list[tuple[int, int]]) -> None:  # noqa: F811
    """Those of an engine do, as `generate` does, though it looks for cancellation before every layer."""
    if status().library is None:
        pytest.skip(status().message)
    tokenizer: Any = _Numbers()
    with ready(tmp_path, "mixtral") as model, Engine(model, tokenizer, prefill_chunk=8) as engine:
        ids = tuple(range(3, 23))
        ask(engine, Prompt("", ids), is_chat=False, temperature=0.0, max_tokens=60)
        calls.clear()
        updates = ask(engine, Prompt("", ids), is_chat=False, temperature=0.0, max_tokens=12)
        assert [layers for layers, _ in calls].count(model.config.num_hidden_layers) >= 11
        tokens = ended(updates).usage.completion
    assert tokens == 12

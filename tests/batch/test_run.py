"""A file of prompts is answered as the server answers each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra offmoe[serve] is not installed")
pytest.importorskip("openai", reason="the extra offmoe[serve] is not installed")

from offmoe.batch.lines import CHAT, COMPLETIONS, read_lines
from offmoe.batch.results import Results
from offmoe.batch.run import Batch, Progress
from tests.chat_demo import load_chat_demo, write_chat_demo

GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = load_chat_demo(write_chat_demo(tmp_path_factory.mktemp("chat")))
    with model.offload:
        yield model, tokenizer


class Killed(Exception):
    """Ends a run where a signal would."""


def run(loaded: tuple[Any, Any], folder: Path, bodies: list[Any], *, stop_after: int = 0) -> tuple[list[Any], int]:
    """Answer requests; their results, and the tokens that were generated. stop_after: lines before it is killed."""
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    lines, tokens = read_lines(source), 0

    def tell(progress: Progress) -> None:
        nonlocal tokens
        tokens = progress.tokens
        if progress.lines == stop_after:
            raise Killed

    batch = Batch(*loaded, ["demo"], "f", 7, default_tokens=5, batch_size=3)
    with Results(out, lines, "f") as results:
        try:
            batch.run(lines, results, tell)
        except Killed:
            return [], tokens
        results.finish()
    return [json.loads(line) for line in out.read_text().splitlines()], tokens


def test_every_line_gets_its_answer_or_its_error(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], **GREEDY, "n": 2}
    bodies = [
        {"custom_id": "text", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "And the LORD said", **GREEDY}},
        {"custom_id": "chat", "method": "POST", "url": CHAT, "body": chat},
        {"prompt": "And the LORD said"},
        {"prompt": "And the LORD said", **GREEDY, "stop": " I"},
        {"prompt": [5] * 1024},
        {"prompt": "x", "stream": True},
        {"prompt": "x", "nonsense": 1},
        {"prompt": "x", "model": "other"},
        {"prompt": "x", "max_tokens": "many"},
        {"prompt": "x", "logit_bias": {"5": float("nan")}},
        {"prompt": "x", "logit_bias": {"5": 101}},
        {"prompt": "x", "logprobs": 2},
        {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 2},
    ]
    results, tokens = run(loaded, tmp_path, bodies)
    answers = [result["response"]["body"] for result in results[:4]]
    assert answers[0]["choices"][0]["text"] == " unto me, I pray thee"
    assert answers[0]["choices"][0]["finish_reason"] == "length"
    assert answers[0]["usage"]["completion_tokens"] == 6
    assert [choice["message"]["role"] for choice in answers[1]["choices"]] == ["assistant"] * 2
    assert answers[2]["usage"]["completion_tokens"] == 5
    assert (answers[3]["choices"][0]["text"], answers[3]["choices"][0]["finish_reason"]) == (" unto me,", "stop")
    assert sum(answer["usage"]["completion_tokens"] for answer in answers) == tokens
    assert [result["error"] for result in results[:4]] == [None] * 4
    codes = [(result["response"]["status_code"], result["error"]["code"]) for result in results[4:]]
    assert codes[0] == (400, "context_length_exceeded")
    assert codes[3] == (404, "model_not_found")
    assert {status for status, _ in codes} == {400, 404}
    assert results[6]["error"]["message"] == "unknown fields: nonsense; leave them out."
    assert results[9]["error"]["message"] == "not JSON: NaN is no JSON value"
    assert results[10]["error"]["message"].startswith("logit_bias")
    for result in results[11:]:
        assert result["error"]["message"] == "logprobs: a batch does not give them; leave them out."


def test_a_run_that_was_killed_goes_on_and_gives_the_same_file(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    bodies = [{"prompt": f"Chapter {i}", "temperature": 0.8, "seed": i, "max_tokens": 3 + i} for i in range(6)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, tokens = run(loaded, tmp_path / "whole", bodies)
    run(loaded, tmp_path / "killed", bodies, stop_after=2)
    resumed, more = run(loaded, tmp_path / "killed", bodies)
    assert resumed == whole
    done = sorted(result["response"]["body"]["usage"]["completion_tokens"] for result in whole)
    assert 0 < more < tokens == sum(done)
    assert run(loaded, tmp_path / "killed", bodies) == (whole, 0)

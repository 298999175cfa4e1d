from __future__ import annotations

import errno
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from offmoe.cli.generate import TextStream
from offmoe.cli.output import Output
from offmoe.trace.trace import read_trace
from tests import tiny
from tests.cli.conftest import TEMPLATE, Outcome, byte_tokenizer

Run = Callable[..., Outcome]

KEYS = {"text", "prompt_tokens", "new_tokens", "ttft_s", "tokens_per_s", "stats", "fill", "pinned", "memory"}
CPU = ("--device", "cpu", "--slots-per-layer", "3")


@pytest.fixture
def with_template(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "chat"
    shutil.copytree(checkpoint, folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def stock_text(folder: Path, prompt: str, new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: tiny.Model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_text_is_that_of_the_stock_model(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("generate", checkpoint, "Once upon", *CPU, "--max-new-tokens", 24, "--json")
    found = outcome.json
    assert outcome.status == 0
    assert found.keys() == KEYS
    assert found["text"] == stock_text(checkpoint, "Once upon", 24)
    assert (found["prompt_tokens"], found["new_tokens"]) == (9, 24)
    assert found["ttft_s"] > 0
    assert found["tokens_per_s"] > 0
    assert found["memory"]["slots_per_layer"] == [3, 3, 3]
    stats = found["stats"]
    assert stats["hits"] + stats["pending"] + stats["misses"] == sum(
        layer["hits"] + layer["pending"] + layer["misses"] for layer in stats["by_layer"]
    )
    assert found["text"] in outcome.err  # streamed, and in the way of nothing


def test_stdout_is_the_text_alone(offmoe: Run, checkpoint: Path) -> None:
    argv = ("generate", checkpoint, "Once upon", *CPU, "--max-new-tokens", 24)
    text = offmoe(*argv, "--json").json["text"]
    outcome = offmoe(*argv)
    assert outcome.out == text + "\n"
    assert outcome.err.startswith("memory on cpu: ")
    for words in ("hit rate", "pending (prefetched)", "MB moved", "9 prompt tokens, 24 new; first after", "tokens/s"):
        assert words in outcome.err
    assert len([line for line in outcome.err.splitlines() if "%" in line]) == 3 + 1


def test_graphs_take_a_static_cache(
    offmoe: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU has none, which is logged, and the text stays."""
    made: list[int] = []
    prepare = StaticCache.__init__

    def counted(cache: StaticCache, *given: Any, **named: Any) -> None:
        made.append(1)
        prepare(cache, *given, **named)

    monkeypatch.setattr(StaticCache, "__init__", counted)
    argv = ("generate", checkpoint, "Once upon", *CPU, "--max-new-tokens", 8, "--lag", 1, "--json")
    text = offmoe(*argv).json["text"]
    assert not made
    outcome = offmoe(*argv, "--cuda-graphs", "auto")
    assert (outcome.status, outcome.json["text"], len(made)) == (0, text, 1)
    assert "cuda_graphs='auto': no layer is captured, since the device captures nothing" in caplog.text


def test_threads_are_gone_afterwards(offmoe: Run, checkpoint: Path) -> None:
    before = set(threading.enumerate())
    offmoe("generate", checkpoint, "Once", *CPU, "--max-new-tokens", 2)
    offmoe("generate", checkpoint, "Once", *CPU, "--max-new-tokens", 600)  # fails after loading nothing
    assert set(threading.enumerate()) <= before


def test_prompts_from_elsewhere(offmoe: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = (*CPU, "--max-new-tokens", 5, "--json")
    direct = offmoe("generate", checkpoint, *tail, "two\nlines").json["text"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert offmoe("generate", checkpoint, "-", *tail).json["text"] == direct
    (tmp_path / "prompt.txt").write_text("two\nlines\n")
    assert offmoe("generate", checkpoint, *tail, "--prompt-file", tmp_path / "prompt.txt").json["text"] == direct
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    assert offmoe("generate", checkpoint, *tail, "--prompt-file", tmp_path / "prompt.txt").status == 2


def test_sampling_follows_the_seed(offmoe: Run, checkpoint: Path) -> None:
    def text(*options: object) -> str:
        return offmoe("generate", checkpoint, "Once", *CPU, "--max-new-tokens", 12, "--json", *options).json["text"]

    hot = ("--temperature", 2.0, "--top-k", 200, "--top-p", 0.99)
    assert text(*hot, "--seed", 1) == text(*hot, "--seed", 1)
    assert len({text(*hot, "--seed", seed) for seed in (1, 2, 3)}) == 3
    assert text("--temperature", 0) == text()


def test_the_chat_template_is_used_if_there_is_one(offmoe: Run, checkpoint: Path, with_template: Path) -> None:
    def tokens(folder: Path, *options: object) -> int:
        return offmoe("generate", folder, "abc", *CPU, "--max-new-tokens", 2, "--json", *options).json["prompt_tokens"]

    assert tokens(checkpoint) == 3
    assert tokens(with_template) == len("<abc>!")
    assert tokens(with_template, "--no-chat-template") == 3
    outcome = offmoe("generate", checkpoint, "abc", "--chat-template", *CPU)
    assert outcome.status == 2
    assert "has none" in outcome.err


def test_a_template_that_fails(offmoe: Run, with_template: Path) -> None:
    (with_template / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    outcome = offmoe("generate", with_template, "abc", *CPU)
    assert outcome.status == 1
    assert "no such role" in outcome.err
    assert "--no-chat-template" in outcome.err


@pytest.mark.parametrize("prefetch", ["0", "2", "auto"])
def test_the_recording_replays_to_the_same_statistics(
    offmoe: Run, checkpoint: Path, tmp_path: Path, prefetch: str
) -> None:
    path = tmp_path / "t.npz"
    ran = offmoe(
        *("generate", checkpoint, "Once upon", *CPU, "--max-new-tokens", 20, "--json"),
        *("--prefetch", prefetch, "--trace", path, "--eviction", "lru"),
    )
    assert f"offmoe simulate {path}" in ran.err
    trace = read_trace(path)
    assert trace.options is not None
    assert trace.pieces is not None
    assert trace.token is not None
    assert trace.pieces.keys() == set(trace.token.tolist())
    letter = byte_tokenizer().convert_tokens_to_ids("O")
    assert isinstance(letter, int)
    assert trace.pieces[letter] == "O"
    simulated = offmoe("simulate", path, "--json").json["stats"]
    of_the_run = ran.json["stats"]
    for stats in (of_the_run, simulated):
        for counts in (stats, *stats["by_layer"]):
            counts.pop("stall_s")
    assert simulated == of_the_run


def test_more_tokens_than_the_model_is_made_for_are_said(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    said = "the model is made for 16 tokens; of 18, those beyond may make no sense."
    for new_tokens, is_said in ((4, False), (5, True)):  # behind a token per byte
        outcome = offmoe("generate", folder, "one two three", *CPU, "--max-new-tokens", new_tokens)
        assert outcome.status == 0
        assert (said in outcome.err) == is_said


def test_context_that_is_not_reserved(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("generate", checkpoint, "Once upon", *CPU, "--max-context", 16, "--max-new-tokens", 9)
    assert (outcome.status, outcome.out) == (1, "")
    assert "use --max-context 17" in outcome.err
    exactly = offmoe("generate", checkpoint, "Once upon", *CPU, "--max-context", 16, "--max-new-tokens", 8, "--json")
    assert exactly.json["new_tokens"] == 8
    unsaid = offmoe("generate", checkpoint, "Once upon", *CPU, "--max-context", 16, "--json")
    assert unsaid.json["new_tokens"] == 8
    assert "at most 8 new tokens" in unsaid.err
    assert offmoe("generate", checkpoint, "Once upon", *CPU, "--max-context", 8).status == 1


def test_without_a_tokenizer(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    outcome = offmoe("generate", folder, "Once", *CPU)
    assert outcome.status == 1
    assert "add the model's tokenizer.json" in outcome.err
    (folder / "tokenizer.json").write_text("{broken")
    outcome = offmoe("generate", folder, "Once", *CPU)
    assert outcome.status == 1
    assert "cannot be loaded" in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_tokenizer_of_another_model(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["Once"])
    tokenizer.save_pretrained(folder)
    outcome = offmoe("generate", folder, "Once", *CPU)
    assert outcome.status == 1
    assert "not of the same model" in outcome.err


def test_a_trace_that_cannot_be_written(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("generate", checkpoint, "Once", *CPU, "--trace", "/no/such/folder/t.npz")
    assert (outcome.status, outcome.out) == (2, "")
    assert "does not exist" in outcome.err


class LeavingReader(io.StringIO):
    """`| head -c 1`: takes one piece."""

    def write(self, text: str) -> int:
        if self.getvalue():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_a_reader_that_leaves(offmoe: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quiet, at once, and nothing goes on."""
    before = set(threading.enumerate())
    monkeypatch.setattr(sys, "stdout", LeavingReader())
    outcome = offmoe("generate", checkpoint, "Once", *CPU, "--max-new-tokens", 500)
    assert outcome.status == 1
    assert outcome.err.startswith("memory on cpu")
    assert outcome.err.count("\n") == 1
    assert set(threading.enumerate()) <= before


# --- the stream


def streamed(ids: list[int], capsys: pytest.CaptureFixture[str]) -> tuple[TextStream, list[str]]:
    """Feed a prompt and then token by token; what stdout got after each."""
    stream = TextStream(byte_tokenizer(), Output(json=False))
    shown = []
    stream.put(torch.tensor([[5, 6, 7]]))
    for token in ids:
        stream.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    stream.end()
    shown.append(capsys.readouterr().out)
    return stream, shown


def test_characters_of_several_tokens_wait_for_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    ids = byte_tokenizer()("aé€b")["input_ids"]
    stream, shown = streamed(ids, capsys)
    assert shown == ["a", "", "é", "", "", "€", "b", "\n"]
    assert stream.text == "aé€b"
    assert stream.count == 7
    assert stream.first_s is not None
    assert stream.tokens_per_s is not None


def test_half_a_character_at_the_end_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    ids = byte_tokenizer()("a€")["input_ids"][:-1]
    stream, shown = streamed(ids, capsys)
    assert "".join(shown) == stream.text + "\n" == "a\ufffd\n"


def test_special_tokens_are_not_text(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    stream, _ = streamed([*tokenizer("ab")["input_ids"], tokenizer.eos_token_id], capsys)
    assert (stream.text, stream.count) == ("ab", 3)


def test_no_rate_from_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    stream, _ = streamed([70], capsys)
    assert stream.tokens_per_s is None
    assert json.dumps(stream.tokens_per_s) == "null"
    assert streamed([], capsys)[0].first_s is None


def test_probabilities_that_are_not_numbers(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(checkpoint, folder)
    tiny.edit(folder, {"lm_head.weight": torch.full((259, 32), float("nan"))})
    outcome = offmoe("generate", folder, "Once", *CPU, "--temperature", 1)
    assert outcome.status == 1
    assert "--dtype bfloat16" in outcome.err


def test_a_generation_config_that_asks_for_beams(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "beams"
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text('{"num_beams": 4, "num_return_sequences": 2, "pad_token_id": 0}')
    assert offmoe("generate", folder, "Once", *CPU, "--max-new-tokens", 3, "--json").json["new_tokens"] == 3

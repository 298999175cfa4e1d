from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offmoe.cli import prompts
from offmoe.errors import ConfigError
from offmoe.trace.trace import read_trace
from tests.cli.conftest import TEMPLATE, Outcome, byte_tokenizer

Run = Callable[..., Outcome]

CPU = ("--device", "cpu", "--slots-per-layer", "3")


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_every_prompt_is_a_request(offmoe: Run, checkpoint: Path, tmp_path: Path, written: Callable[..., Path]) -> None:
    out = tmp_path / "t.npz"
    asked = written("p.txt", "Once upon\n\nab c\n")
    found = offmoe("trace", checkpoint, "--prompts", asked, "-o", out, *CPU, "--max-new-tokens", 6, "--json").json
    trace = read_trace(out)
    assert (found["requests"], found["new_tokens"]) == (2, 12)
    assert found["tokens"] == trace.tokens == 9 + 5 + 4 + 5  # the last new token is not fed back
    assert trace.request.tolist() == [0] * 14 + [1] * 9
    assert trace.prefill.tolist() == [True] * 9 + [False] * 5 + [True] * 4 + [False] * 5
    assert trace.token is not None
    assert trace.pieces is not None
    assert trace.pieces.keys() == set(trace.token.tolist())
    assert "".join(trace.pieces[t] for t in trace.token[:9].tolist()) == "Once upon"
    assert "".join(trace.pieces[t] for t in trace.token[14:18].tolist()) == "ab c"
    assert (trace.experts >= 0).all()
    assert found["stats"]["hits"] + found["stats"]["pending"] + found["stats"]["misses"] > 0


def test_the_recording_replays_and_reports(
    offmoe: Run, checkpoint: Path, tmp_path: Path, written: Callable[..., Path]
) -> None:
    out = tmp_path / "t.npz"
    asked = written("p.txt", "one\ntwo\nthree\n")
    ran = offmoe("trace", checkpoint, "--prompts", asked, "-o", out, *CPU, "--max-new-tokens", 8, "--json")
    assert f"offmoe report {out}" in ran.err
    simulated = offmoe("simulate", out, "--json").json["stats"]
    of_the_run = ran.json["stats"]
    for stats in (of_the_run, simulated):
        for counts in (stats, *stats["by_layer"]):
            counts.pop("stall_s")
    assert simulated == of_the_run
    found = offmoe("report", out, "--json").json
    assert (found["tokens"], found["requests"]) == (ran.json["tokens"], 3)
    assert found["phases"]["prefill"]["tokens"] == 3 + 3 + 5
    hidden, inner = 32, 48
    assert found["active"]["parameters_total"] - found["active"]["parameters"] == 3 * (8 - 2) * 3 * hidden * inner
    assert found["specialisation"] is not None


def test_a_recording_is_that_of_generate(
    offmoe: Run, checkpoint: Path, tmp_path: Path, written: Callable[..., Path]
) -> None:
    asked = written("p.txt", "Once upon\n")
    tail = (*CPU, "--max-new-tokens", 6, "--temperature", 1.5, "--seed", 4)
    assert offmoe("trace", checkpoint, "--prompts", asked, "-o", tmp_path / "a.npz", *tail).status == 0
    assert offmoe("generate", checkpoint, "Once upon", "--trace", tmp_path / "b.npz", *tail).status == 0
    a, b = read_trace(tmp_path / "a.npz"), read_trace(tmp_path / "b.npz")
    assert (a.experts == b.experts).all()
    assert a.token is not None
    assert b.token is not None
    assert (a.token == b.token).all()
    assert (a.pieces, a.options) == (b.pieces, b.options)


def test_merging(offmoe: Run, checkpoint: Path, tmp_path: Path, written: Callable[..., Path]) -> None:
    parts = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for part, text in zip(parts, ("ab\ncd\n", "ef\n"), strict=True):
        asked = written("p.txt", text)
        assert offmoe("trace", checkpoint, "--prompts", asked, "-o", part, *CPU, "--max-new-tokens", 3).status == 0
    whole = tmp_path / "w.npz"
    found = offmoe("trace", "--merge", *parts, "-o", whole, "--json").json
    trace = read_trace(whole)
    assert (found["tokens"], found["requests"], found["merged"]) == (12, 3, 2)
    assert trace.request.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (trace.experts == np.concatenate([read_trace(part).experts for part in parts])).all()
    assert trace.options is not None
    other = tmp_path / "other.npz"
    fixture = Path(__file__).parents[1] / "data" / "gptoss20b_6req.npz"
    shutil.copy(fixture, other)
    outcome = offmoe("trace", "--merge", parts[0], other, "-o", tmp_path / "no.npz")
    assert outcome.status == 1
    assert "24 MoE layers, the first has 3" in outcome.err
    assert not (tmp_path / "no.npz").exists()


def test_chats(offmoe: Run, checkpoint: Path, tmp_path: Path, written: Callable[..., Path]) -> None:
    lines = [{"prompt": "abc"}, {"messages": [{"role": "user", "content": "d"}, {"role": "user", "content": "e"}]}]
    asked = written("p.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "t.npz"
    tail = ("--prompts", asked, "-o", out, *CPU, "--max-new-tokens", 2)
    outcome = offmoe("trace", checkpoint, *tail)
    assert outcome.status == 2
    assert "p.jsonl, line 2: messages need the chat template" in outcome.err
    folder = tmp_path / "chat"
    shutil.copytree(checkpoint, folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    assert offmoe("trace", folder, *tail).status == 0
    trace = read_trace(out)
    assert trace.token is not None
    assert trace.pieces is not None
    texts = ["".join(trace.pieces[t] for t in trace.token[trace.request == r][:-1].tolist()) for r in (0, 1)]
    assert texts == ["<abc>!", "<d><e>!"]


def test_prompts_from_stdin(offmoe: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\n"))
    tail = ("-o", tmp_path / "t.npz", *CPU, "--max-new-tokens", 1, "--json")
    assert offmoe("trace", checkpoint, "--prompts", "-", *tail).json["requests"] == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["MODEL", "--prompts", "p.txt"], "-o TRACE is missing"),
        (["MODEL", "-o", "t.npz"], "--prompts FILE is missing"),
        (["--prompts", "p.txt", "-o", "t.npz"], "MODEL is missing"),
        (["MODEL", "--prompts", "/no/such", "-o", "t.npz"], "No such file"),
        (["MODEL", "--merge", "a.npz", "-o", "t.npz", "--prompts", "p"], "runs no model"),
        (["MODEL", "--prompts", "p.txt", "-o", "t.npz", "--top-k", "3"], "give --temperature T as well"),
    ],
)
def test_wrong_options(offmoe: Run, checkpoint: Path, options: list[str], says: str) -> None:
    outcome = offmoe("trace", *(checkpoint if option == "MODEL" else option for option in options))
    assert (outcome.status, outcome.out) == (2, "")
    assert says in outcome.err


def test_prompts_that_do_not_fit(offmoe: Run, checkpoint: Path, tmp_path: Path, written: Callable[..., Path]) -> None:
    """Refused before anything is loaded, by the line."""
    asked = written("p.txt", "a\n" + "b" * 30 + "\n")
    out = tmp_path / "t.npz"
    tail = ("--prompts", asked, "-o", out, *CPU, "--max-context", 16, "--max-new-tokens", 4)
    outcome = offmoe("trace", checkpoint, *tail)
    assert outcome.status == 1
    assert "p.txt, line 2: 30 prompt tokens" in outcome.err
    assert not out.exists()


# --- reading prompts


def contents(path: Path, paragraphs: bool = False) -> list[object]:
    return [prompt.content for prompt in prompts.read_prompts(str(path), paragraphs)]


def test_lines_and_paragraphs(written: Callable[..., Path]) -> None:
    path = written("p.txt", "\n one\r\ntwo \n \n\nthree\n")
    assert contents(path) == [" one", "two ", "three"]
    assert contents(path, paragraphs=True) == [" one\ntwo ", "three"]
    where = [prompt.where.rpartition(", ")[2] for prompt in prompts.read_prompts(str(path), True)]
    assert where == ["line 2", "line 6"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{broken', "line 2: not JSON"),
        ("p.jsonl", '{"text": "a"}', "line 1: no prompt"),
        ("p.jsonl", '["a"]', "line 1: no prompt"),
        ("p.jsonl", '{"prompt": 3}', "line 1: no prompt"),
        ("p.jsonl", '{"messages": [{"content": "a"}]}', "line 1: no prompt"),
        ("p.jsonl", '{"messages": []}', "line 1: no prompt"),
        ("p.ndjson", "[" * 5000, "not JSON"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "not valid UTF-8"),
    ],
)
def test_files_that_hold_no_prompts(written: Callable[..., Path], name: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        contents(written(name, text))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        contents(tmp_path / "p.txt")
    with pytest.raises(ConfigError, match="--paragraphs is for"):
        contents(tmp_path / "p.jsonl", paragraphs=True) if (tmp_path / "p.jsonl").write_text("{}") else None


class Joining:
    """A decoder that drops the space before the first word, as SentencePiece ones do."""

    def decode(self, ids: list[int]) -> str:
        return {1: "the", 2: "ing"}[ids[0]]

    def convert_ids_to_tokens(self, token: int) -> str:
        return {1: "\u2581the", 2: "ing"}[token]


def test_pieces_keep_the_space_that_starts_a_word() -> None:
    tokenizer: Any = Joining()
    assert prompts.pieces(tokenizer, [1, 2]) == {1: " the", 2: "ing"}

"""offmoe chat: one prompt from a pipe, the commands, the input line, and how an answer is shown."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from offmoe.cli.chat_commands import SETTINGS, State, run_command
from offmoe.cli.chat_input import reader
from offmoe.cli.chat_view import AnswerView, split_paragraphs
from offmoe.dialogue.answer import Call, Reasoning, Text
from offmoe.dialogue.conversation import Conversation
from offmoe.dialogue.messages import Message, ToolCall
from offmoe.dialogue.sampling import Sampling
from offmoe.errors import ConfigError
from tests.cli.conftest import Outcome

TURNS = [
    Message("user", "a"),
    Message("assistant", "b", "hm", (ToolCall("c1", "f", {"x": 1}),)),
    Message("tool", "c", call_id="c1"),
]


def piped(offmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, text: str, *options: object) -> Outcome:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return offmoe("chat", "demo", "--max-new-tokens", 6, "--temperature", 0, "--device", "cpu", *options)


def test_a_piped_prompt_is_answered_once(offmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = piped(offmoe, monkeypatch, "And the LORD said\n")
    answer = piped(offmoe, monkeypatch, "And the LORD said\n", "--json")
    assert (plain.status, answer.status) == (0, 0)
    assert plain.out.strip("\n") == answer.json["text"] == " unto me, I pray thee"
    assert (answer.json["new_tokens"], answer.json["tool_calls"], answer.json["reasoning"]) == (6, [], "")
    assert answer.json["stats"]["hit_rate"] <= 1


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", (), "stdin has no prompt"),
        ("a", ("--think",), "--think: this model's chat template"),
        ("a", ("--temperature", "-1"), "temperature is -1"),
        ("a b c " * 400, ("--max-context", "300"), "the prompt has"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    offmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, text: str, options: tuple[str, ...], words: str
) -> None:
    outcome = piped(offmoe, monkeypatch, text, *options)
    assert outcome.status in (1, 2)
    assert words in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def state() -> State:
    return State(Conversation("be brief", list(TURNS)), Sampling())


def command(line: str, on: State) -> str | None:
    return run_command(line, on, lambda: "the stats")


def test_commands_change_the_conversation(tmp_path: Path) -> None:
    here = state()
    command(f"/save '{tmp_path / 'a b.json'}'", here)
    command("/reset", here)
    command("/system  speak   up ", here)
    assert (here.conversation.system, here.conversation.turns) == ("speak   up", [])
    command(f"/load '{tmp_path / 'a b.json'}'", here)
    assert here.conversation == state().conversation
    assert command("/stats", here) == "the stats"
    assert command("/bye", here) is None


def test_set_changes_how_it_answers() -> None:
    here = state()
    for name in SETTINGS:
        command(f"/set {name} 1", here)
        assert getattr(here.sampling, name) == 1
    command("/set temperature 0.7", here)
    assert "temperature 0.7" in str(command("/set", here))
    command("/set temperature default", here)
    assert here.sampling.temperature is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sett", "did you mean"),
        ("/set temprature 1", "did you mean 'temperature'"),
        ("/set temperature warm", "'warm' is not a number"),
        ("/set temperature -1", "temperature is -1"),
        ("/set top_k 1.5", "not a whole number"),
        ("/set seed", "takes one value"),
        ("/save", "takes the name of one file"),
        ("/load /nowhere/x.json", "cannot be read"),
        ("/save /nowhere/x.json", "does not exist"),
        ("/save 'x", "quotation"),
    ],
)
def test_a_wrong_command_says_what_would_work(line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        command(line, state())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "offmoe-conversation", "version": 2}', "\x00"])
def test_a_file_that_is_no_conversation_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ConfigError, match="not a conversation of offmoe chat"):
        Conversation.load(tmp_path / "x")


def entered(keys: str, history: Path) -> list[str]:
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        return list(reader(pipe, DummyOutput(), history))


def test_the_input_line_takes_several_lines_and_remembers(tmp_path: Path) -> None:
    keys = "one\r" + "two\\\rthree\r" + "four\x1b\rfive\r" + "gone\x03" + "\x04"
    assert entered(keys, tmp_path / "h") == ["one", "two\nthree", "four\nfive"]
    assert next(iter(FileHistory(str(tmp_path / "h")).load_history_strings())) == "four\nfive"
    assert (tmp_path / "h").stat().st_mode & 0o077 == 0


def shown(terminal: bool, *updates: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=60, color_system=None, legacy_windows=False)
    with AnswerView(console) as view:
        for update in updates:
            view.show(update)
    return stream.getvalue()


def test_a_pipe_gets_the_text_as_it_is() -> None:
    out = shown(False, Reasoning("hm"), Text("**a"), Text("b**\n\nc"), Call(ToolCall("1", "f", {"x": "é"})))
    assert out == 'hm\n**ab**\n\nc\n→ f({"x": "é"})\n'


def test_a_terminal_gets_markdown() -> None:
    out = shown(True, Text("# Ti"), Text("tle\n\nsome *te"), Text("xt*\n\n```\na\n\nb\n```\n"))
    lines = [line.strip() for line in out.replace("\x1b", "\n").splitlines()]
    assert not any("*te" in line for line in lines[-12:])
    assert "some text" in out


def test_paragraphs_end_outside_of_code_only() -> None:
    assert split_paragraphs("a\n\nb") == ("a\n\n", "b")
    assert split_paragraphs("a\nb") == ("", "a\nb")
    assert split_paragraphs("```\na\n\nb") == ("", "```\na\n\nb")
    assert split_paragraphs("```\na\n\n```\n\nb") == ("```\na\n\n```\n\n", "b")


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_only(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "offmoe", "chat", "demo", "--device", "cpu", "--temperature", "0"]
    streams: Any = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    home = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(command, **streams, env=home, start_new_session=True) as process:
        os.close(terminal)

        def wait_for(words: str, seconds: float = 60) -> None:
            seen, end = b"", time.monotonic() + seconds
            while words.encode() not in seen:
                assert select.select([controller], [], [], max(0.0, end - time.monotonic()))[0], seen
                seen += os.read(controller, 4096)
                if b"\x1b[6n" in seen:  # a terminal would say where its cursor is
                    os.write(controller, b"\x1b[1;1R")

        try:
            wait_for("\x1b[6n")
            os.write(controller, b"And the LORD said\r")
            wait_for("unto")
            process.send_signal(signal.SIGINT)
            wait_for("\x1b[6n")
            os.write(controller, b"/stats\r")
            wait_for("last answer")
            os.write(controller, b"/bye\r")
        except BaseException:
            process.kill()
            raise
        assert process.wait(timeout=30) == 0
    os.close(controller)


def test_json_of_an_answer_is_one_line(offmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(piped(offmoe, monkeypatch, "And", "--json", "--seed", 3).out)["text"]

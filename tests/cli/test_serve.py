"""offmoe serve as a process: it says where it is, answers, keeps its state and ends with a signal; wrong options."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Outcome

pytest.importorskip("starlette", reason="the extra offmoe[serve] is not installed")
CHAT = {"messages": [{"role": "user", "content": "And the LORD said"}], "temperature": 0}


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    return urllib.request.urlopen(request, timeout=60)


@pytest.mark.parametrize(("number", "tokens"), [(signal.SIGINT, 40_000), (signal.SIGTERM, 60)])
def test_a_signal_ends_the_server_and_its_streams(tmp_path: Path, number: int, tokens: int) -> None:
    """Ctrl-C breaks a long answer off; after SIGTERM a short one is completed."""
    state = tmp_path / "state.json"
    command = [sys.executable, "-m", "offmoe", "serve", "demo", "--port", "0", "--json", "--state", str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            started = json.loads(process.stdout.readline())
            assert (started["models"], started["url"][:17]) == (["demo"], "http://127.0.0.1:")
            answer = json.load(post(started["url"], {**CHAT, "max_tokens": 6}))
            assert answer["choices"][0]["message"]["content"] == " unto me, I pray thee"
            stream = post(started["url"], {**CHAT, "stream": True, "logit_bias": {"0": -100}, "max_tokens": tokens})
            stream.readline()
            process.send_signal(number)
            rest = stream.read().decode()
            status = process.wait(timeout=60)
        except BaseException:
            process.kill()
            raise
        assert process.stderr is not None
        log = process.stderr.read()
    assert status == (130 if number == signal.SIGINT else 0)
    assert "shutting_down" in rest if number == signal.SIGINT else rest.endswith("data: [DONE]\n\n")
    assert "Traceback" not in log
    assert "And the LORD" not in log  # prompts are nobody's business
    assert json.loads(state.read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "not a port"),
        (["--parallel", "0"], "not a positive whole number"),
        (["--prefix-reuse", "all"], "one of exact, numeric, off, auto"),
        (["--log-format", "xml"], "must be text or json"),
        (["--host", "256.0.0.1"], "cannot listen at 256.0.0.1"),
    ],
)
def test_a_wrong_option_is_one_line(offmoe: Callable[..., Outcome], options: list[str], words: str) -> None:
    outcome = offmoe("serve", "demo", *options)
    assert outcome.status == 2
    assert words in outcome.err.splitlines()[-1]


def test_a_port_in_use_is_said(offmoe: Callable[..., Outcome]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = offmoe("serve", "demo", "--port", taken.getsockname()[1])
    assert outcome.status == 2
    assert "choose another --port" in outcome.err

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from offmoe.cli.output import Output, logging_to_stderr
from offmoe.errors import OffmoeError
from offmoe.text import percent, plain, span


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_json_has_stdout_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=True)
    out.text("words")
    out.result("a line")
    out.note("a note")
    out.json({"text": "é"})
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout) == {"text": "é"}
    assert stderr == "wordsa line\na note\n"


def test_without_json_results_are_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=False)
    out.text("words")
    out.result(" a line")
    out.details("details")
    out.json({"text": "é"})
    assert capsys.readouterr() == ("words a line\n", "details\n")


def test_a_terminal_without_the_character_gets_a_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Output(json=False).text("caf\u00e9 \udcff")
    assert raw.getvalue() == b"caf? ?"


def test_a_full_disk_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OffmoeError, match="cannot write to stdout: No space left"):
        Output(json=False).text("words")


def test_log_level_is_restored(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("offmoe")
    before = (logger.level, list(logger.handlers))
    with logging_to_stderr(verbose=True):
        logging.getLogger("offmoe.api").info("seen")
    with logging_to_stderr(verbose=False):
        logging.getLogger("offmoe.api").info("not seen")
        logging.getLogger("offmoe.api").warning("a warning")
    assert capsys.readouterr().err == "offmoe: INFO: seen\noffmoe: WARNING: a warning\n"
    assert (logger.level, logger.handlers) == before


def test_words() -> None:
    assert percent(0.61649) == "61.6 %"
    assert (span((4, 4)), span((2, 8, 3))) == ("4", "2-8")
    assert (plain((4, 4)), plain((4, 5))) == (4, [4, 5])

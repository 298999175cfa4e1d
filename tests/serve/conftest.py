"""One engine for the tests of a module, with the chat demo behind it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from offmoe.serve.engine import Engine
from tests.chat_demo import load_chat_demo, write_chat_demo

collect_ignore = [] if find_spec("starlette") and find_spec("openai") else ["http"]
"""Without the extra offmoe[serve], as on Python 3.10, there is no HTTP to test."""


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_demo(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def loaded(chat_folder: Path) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = load_chat_demo(chat_folder)
    with model.offload:
        yield model, tokenizer


@pytest.fixture
def engine(loaded: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(*loaded, prefill_chunk=64) as engine:
        yield engine

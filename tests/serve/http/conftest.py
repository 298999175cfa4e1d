"""The application around one engine, and a server of it at a socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from offmoe.serve.engine import Engine
from offmoe.serve.http.app import build_app
from offmoe.serve.http.guard import Access
from offmoe.serve.http.service import Service
from offmoe.serve.run import bind
from tests.chat_demo import load_chat_demo

CONTEXT = 384
"""Tokens of context: enough for every case, and few, since some answers fill it."""


@pytest.fixture(scope="module")
def running(chat_folder: Path) -> Iterator[Engine]:
    """An engine for all tests of a module; its kept caches stay from test to test."""
    model, tokenizer = load_chat_demo(chat_folder, slots_per_layer=8, max_context=CONTEXT)
    with model.offload, Engine(model, tokenizer, prefill_chunk=64) as engine:
        yield engine


@pytest.fixture
def client(running: Engine) -> Iterator[TestClient]:
    """Sends requests to the application, without a socket."""
    app = build_app(Service(running, ["demo", "alias"]), Access())
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
    running.kept.clear()


@contextmanager
def at_socket(app: Any) -> Iterator[str]:
    """Serve an application -> its address."""
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@pytest.fixture(scope="module")
def address(running: Engine) -> Iterator[str]:
    """Address of a server."""
    with at_socket(build_app(Service(running, ["demo"]), Access())) as url:
        yield url

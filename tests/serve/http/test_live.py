"""The live page: it needs nothing but this server, and its figures are what happened."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from offmoe.serve.http.app import build_app
from offmoe.serve.http.guard import Access
from offmoe.serve.http.live import live_routes
from offmoe.serve.http.service import Service
from tests.serve.http.conftest import at_socket

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def app_of(running: Any) -> Any:
    return build_app(Service(running, ["demo"]), Access(), more=live_routes(running, "demo"))


def test_the_page_asks_nothing_of_anybody_else(running: Any) -> None:
    reply = TestClient(app_of(running), base_url="http://localhost").get("/")
    assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=|https?:|@import|url\(", reply.text)


def test_figures_are_what_happened(running: Any) -> None:
    client = TestClient(app_of(running), base_url="http://localhost")
    before = client.get("/live.json").json()
    body = {"messages": [{"role": "user", "content": "And the LORD said"}], "max_tokens": 3, "temperature": 0}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    after = client.get("/live.json").json()
    assert after["new_tokens"] - before["new_tokens"] == 3
    assert after["prompt_tokens"] - before["prompt_tokens"] == usage["prompt_tokens"]
    shape = running.offload.shape
    assert [len(row) for row in after["routed"]] == [len(row) for row in after["places"]] == list(shape.experts)
    passed = usage["prompt_tokens"] + 2 - usage["prompt_tokens_details"]["cached_tokens"]
    for layer in range(shape.layers):
        assert sum(after["routed"][layer]) - sum(before["routed"][layer]) == passed * shape.top_k[layer]
    assert sum(place == 2 for row in after["places"] for place in row) <= sum(running.offload.memory().slots_per_layer)
    assert after["memory"]["slots"] == running.offload.memory().slots


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [500, 1100])
def test_a_browser_draws_it(running: Any, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    with at_socket(app_of(running)) as url:
        options = ["--headless=new", "--no-sandbox", f"--window-size={width},1200", "--virtual-time-budget=4000"]
        shot = tmp_path / "page.png"
        command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}"]
        subprocess.run([*command, f"--screenshot={shot}", url], check=True, timeout=60, capture_output=True)
        dumped = subprocess.run([*command, "--dump-dom", url], check=True, timeout=60, capture_output=True, text=True)
    assert shot.stat().st_size > 5000
    assert '<h1 id="model">demo</h1>' in dumped.stdout

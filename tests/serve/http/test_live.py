"""The live page: it needs nothing but this server, and its figures are what happened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from offmoe.serve.http.app import build_app
from offmoe.serve.http.guard import Access
from offmoe.serve.http.live import live_routes
from offmoe.serve.http.service import Service
from tests.serve.http.browser import CHROMIUM, open_page
from tests.serve.http.conftest import at_socket


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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (chromium, chromium-browser or google-chrome)")
def test_a_browser_draws_it(running: Any, tmp_path: Path) -> None:
    """In both color schemes and at two widths: nothing is cut off, nothing complains, and the figures arrive."""
    grounds = {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 21, 23)"}
    with at_socket(app_of(running)) as url, open_page(tmp_path / "profile") as page:
        for scheme, ground in grounds.items():
            for width in (500, 1100):
                page.open(url, width, scheme)
                page.value(FIGURES_ARRIVED)
                page.screenshot(tmp_path / f"{scheme}-{width}.png")
                assert page.value("document.getElementById('model').textContent") == "demo"
                assert page.value("getComputedStyle(document.body).backgroundColor") == ground
                assert page.value("document.documentElement.scrollWidth") <= width
                columns = page.value("getComputedStyle(document.querySelector('.cards')).gridTemplateColumns")
                assert len(columns.split()) == (2 if width == 500 else 4)
                expected = len(running.offload.shape.experts)
                assert page.value("document.getElementById('map').height") >= 4 * expected
                assert page.value(COLORS_OF_THE_MAP) > 2, "slots, disk and ground"
    assert not page.complaints


FIGURES_ARRIVED = """new Promise(arrived => {
  const look = () => document.getElementById("device").textContent ? arrived(true) : setTimeout(look, 20);
  if (document.readyState === "complete") look(); else addEventListener("load", look);
})"""
COLORS_OF_THE_MAP = """(() => {
  const map = document.getElementById("map"), pixels = map.getContext("2d").getImageData(0, 0, map.width, map.height);
  return new Set(new Uint32Array(pixels.data.buffer)).size;
})()"""

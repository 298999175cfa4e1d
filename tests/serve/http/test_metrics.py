"""Metrics: what was counted is what happened."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from offmoe.serve.http.app import build_app
from offmoe.serve.http.guard import Access
from offmoe.serve.http.metrics import metrics_route
from offmoe.serve.http.service import Service


def scrape(client: TestClient) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_counts_what_happened(running: Any) -> None:
    app = build_app(Service(running, ["demo"]), Access(), more=[metrics_route(running)])
    client = TestClient(app, base_url="http://localhost")
    running.kept.clear()
    before, stats = scrape(client), running.offload.stats()
    body = {"messages": [{"role": "user", "content": "And the LORD said. " * 14}], "max_tokens": 4, "temperature": 0}
    usages = [client.post("/v1/chat/completions", json=body).json()["usage"] for _ in range(2)]
    after, delta = scrape(client), running.offload.stats() - stats

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grown("offmoe_requests_total", "length") == 2
    assert grown("offmoe_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert grown("offmoe_generated_tokens_total") == 8
    assert grown("offmoe_prompt_tokens_cached_total") == usages[1]["prompt_tokens_details"]["cached_tokens"] > 0
    assert grown("offmoe_time_to_first_token_seconds_count") == 2
    assert grown("offmoe_inter_token_seconds_count") == 6
    assert (
        after["offmoe_time_to_first_token_seconds_bucket", "+Inf"] == after["offmoe_time_to_first_token_seconds_count",]
    )
    assert after["offmoe_kv_tokens", "kept"] == running.kept.kept > 0
    assert after["offmoe_kv_tokens", "running"] == after["offmoe_requests_running",] == 0
    for layer, counts in enumerate(delta.by_layer):
        for outcome in ("hits", "pending", "misses"):
            assert grown("offmoe_expert_demands_total", str(layer), outcome) == getattr(counts, outcome)
    assert grown("offmoe_expert_bytes_total", "disk") == delta.disk_bytes
    assert after["offmoe_memory_bytes", "slots"] == running.offload.memory().slots

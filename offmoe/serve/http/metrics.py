"""GET /metrics for Prometheus. Every figure is read when it is asked for; nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from offmoe.serve.engine import Engine
from offmoe.serve.meters import Histogram

OUTCOMES = ("hits", "pending", "misses")
"""How a demand found its expert: in a slot, on its way by a prefetch, or not at all."""


class EngineCollector:
    """Reads the engine, its kept caches and the expert cache for Prometheus."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        yield from self._requests()
        yield from self._experts()

    def _requests(self) -> Iterator[Metric]:
        engine, meters = self._engine, self._engine.meters
        with meters.lock:
            answers = CounterMetricFamily("offmoe_requests", "Answers by how they ended.", labels=["outcome"])
            for outcome, count in sorted(meters.answers.items()):
                answers.add_metric([outcome], count)
            yield answers
            tokens = {
                "prompt_tokens": ("Tokens of prompts.", meters.prompt_tokens),
                "prompt_tokens_cached": ("Tokens of prompts that a kept cache held.", meters.cached_tokens),
                "generated_tokens": ("Tokens of answers.", meters.new_tokens),
            }
            for name, (text, value) in tokens.items():
                yield CounterMetricFamily(f"offmoe_{name}", text, value)
            first = "Seconds from a request to its first token, the queue included."
            yield _histogram("offmoe_time_to_first_token_seconds", first, meters.ttft_s)
            yield _histogram("offmoe_inter_token_seconds", "Seconds between two tokens of an answer.", meters.token_s)
        yield GaugeMetricFamily("offmoe_requests_running", "Answers under way.", engine.running)
        yield GaugeMetricFamily("offmoe_requests_waiting", "Answers in the queue.", engine.waiting)
        kv = GaugeMetricFamily("offmoe_kv_tokens", "Tokens of context, by what they are for.", labels=["use"])
        for use, value in (("running", engine.kept.running), ("kept", engine.kept.kept), ("limit", engine.kept.limit)):
            kv.add_metric([use], value)
        yield kv

    def _experts(self) -> Iterator[Metric]:
        stats = self._engine.offload.stats()
        text = "Experts that a layer demanded, by how it found them."
        demands = CounterMetricFamily("offmoe_expert_demands", text, labels=["layer", "outcome"])
        rate = GaugeMetricFamily("offmoe_expert_hit_rate", "Demands that waited for no read, of all.", labels=["layer"])
        for layer, counts in enumerate(stats.by_layer):
            for outcome in OUTCOMES:
                demands.add_metric([str(layer), outcome], getattr(counts, outcome))
            rate.add_metric([str(layer)], counts.hit_rate)
        yield demands
        yield rate
        moved = CounterMetricFamily("offmoe_expert_bytes", "Bytes of experts that were moved.", labels=["from"])
        moved.add_metric(["disk"], stats.disk_bytes)
        moved.add_metric(["host"], stats.h2d_bytes)
        yield moved
        yield CounterMetricFamily("offmoe_stall_seconds", "Seconds that computing waited for experts.", stats.stall_s)
        plan = self._engine.offload.memory()
        memory = GaugeMetricFamily("offmoe_memory_bytes", "Planned memory of the device, by part.", labels=["part"])
        for part in ("dense", "slots", "kv", "staging", "workspace"):
            memory.add_metric([part], getattr(plan, part))
        yield memory


def _histogram(name: str, text: str, values: Histogram) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, buckets=values.buckets(), sum_value=values.total)


def metrics_route(engine: Engine) -> Route:
    """The route of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(engine))

    def metrics(_: HttpRequest) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Route("/metrics", metrics)

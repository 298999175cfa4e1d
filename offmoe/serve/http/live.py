"""The live page at /, and the figures that it asks for once a second."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from offmoe.serve.engine import Engine

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""The page's content security policy: it loads nothing from anywhere, and asks this server alone."""
SLOT, RAM, DISK = 2, 1, 0
"""Where an expert is, as the page's map says it."""


def live_routes(engine: Engine, model: str) -> list[Route]:
    """The routes of the page and of its figures. model: the name that the page shows."""
    page = files("offmoe.serve.http").joinpath("live.html").read_text(encoding="utf-8")

    def show(_: HttpRequest) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": POLICY})

    def figures(_: HttpRequest) -> Response:
        return JSONResponse(snapshot(engine, model), headers={"cache-control": "no-store"})

    return [Route("/", show), Route("/live.json", figures)]


def snapshot(engine: Engine, model: str) -> dict[str, Any]:
    """What the page shows, as it is now. Counts go up; the page itself makes rates of them."""
    offload, meters = engine.offload, engine.meters
    stats, plan = offload.stats(), offload.memory()
    fill = offload.fill_progress()
    parts = {name: getattr(plan, name) for name in ("dense", "slots", "scratch", "kv", "staging", "workspace")}
    host = {} if plan.host is None else {"slots": plan.host.slots, "staging": plan.host.staging}
    routed, places = offload.expert_map()
    return {
        "model": model,
        "device": str(offload.config.device),
        "running": engine.running,
        "waiting": engine.waiting,
        "prompt_tokens": meters.prompt_tokens,
        "cached_tokens": meters.cached_tokens,
        "new_tokens": meters.new_tokens,
        "kv": {"running": engine.kept.running, "kept": engine.kept.kept, "limit": engine.kept.limit},
        "conversations": engine.kept.conversations,
        "demands": stats.demands,
        "hits": stats.hits + stats.pending,
        "disk_bytes": stats.disk_bytes,
        "h2d_bytes": stats.h2d_bytes,
        "stall_s": stats.stall_s,
        "fill": {"bytes": fill.nbytes, "total": fill.total_bytes, "running": fill.running},
        "memory": parts,
        "host_memory": host,
        "routed": routed,
        "places": places,
    }

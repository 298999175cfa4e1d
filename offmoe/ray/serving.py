"""The HTTP server of `offmoe serve` as a deployment of Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from offmoe.api import HUB_OPTIONS, from_pretrained
from offmoe.extras import require
from offmoe.hf.hub.locate import locate
from offmoe.hf.load.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp


class Replica:
    """One model behind the HTTP APIs of OpenAI and Anthropic. Arguments as in `deployment`."""

    def __init__(
        self,
        model: str,
        names: Sequence[str],
        engine: dict[str, Any],
        strict: bool,
        api_key: str | None,
        hosts: Sequence[str],
        options: dict[str, Any],
    ):
        from offmoe.serve.engine import Engine
        from offmoe.serve.http.guard import Access
        from offmoe.serve.http.service import Service

        self._model: Any = from_pretrained(model, **options)
        source = locate(model, **{name: options[name] for name in HUB_OPTIONS if name in options})
        self._engine = Engine(self._model, load_tokenizer(source.model, source.beside), **engine)
        self._service = Service(self._engine, list(names) or [model], strict=strict, strict_by="strict")
        self._access = Access(api_key=api_key, names=hosts)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application; Ray Serve asks for it when the replica has been made."""
        from offmoe.serve.http.app import build_app
        from offmoe.serve.http.metrics import metrics_route

        return build_app(self._service, self._access, more=[metrics_route(self._engine)])

    def __del__(self) -> None:
        with suppress(AttributeError):  # the model was not loaded
            self._engine.close()
        with suppress(AttributeError):
            self._model.offload.close()


def deployment(
    model: str,
    *,
    names: Sequence[str] = (),
    parallel: int = 1,
    queue: int = 32,
    prefix_reuse: str = "auto",
    strict: bool = False,
    api_key: str | None = None,
    hosts: Sequence[str] = ("*",),
    deployment_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Application:
    """The server of `offmoe serve` as an application of Ray Serve: `serve.run(deployment("demo"))`.

    Args:
        model: As in `offmoe.from_pretrained`. Every machine has to reach it.
        names: Names that requests may call the model by, its id first. Default: `model`.
        parallel: Answers that a replica computes in turns; the others wait.
        queue: Answers that may wait in a replica; more get status 429.
        prefix_reuse: As `--prefix-reuse` of `offmoe serve`.
        strict: Whether fields that no API defines are refused.
        api_key: The key that requests have to bring. Default: none.
        hosts: Names that the server may be reached by; "*" for all.
        deployment_options: Of `ray.serve.deployment`: `num_replicas`, `ray_actor_options={"num_gpus": 1}`.
        options: Of `offmoe.from_pretrained`.

    Raises:
        ConfigError: Ray Serve, or what `offmoe serve` needs, is not installed.
    """
    require("ray", "offmoe.ray.deployment", "ray", "fastapi", "openai")
    from ray import serve

    engine = {"parallel": parallel, "queue": queue, "prefix_reuse": prefix_reuse}
    asked = {"max_ongoing_requests": parallel + queue, **(deployment_options or {})}
    replica = serve.deployment(serve.ingress()(Replica), name="offmoe", **asked)
    app: Application = replica.bind(model, names, engine, strict, api_key, hosts, options)
    return app

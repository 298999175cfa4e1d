"""`offmoe serve MODEL`: answer the HTTP APIs of OpenAI and Anthropic with a model.

It ends with Ctrl-C, which cancels the answers under way, or with SIGTERM, which lets them finish for ten seconds.
"""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from offmoe.cli import options
from offmoe.cli.model import open_model
from offmoe.cli.output import Output
from offmoe.cli.state_file import check_state
from offmoe.errors import ConfigError
from offmoe.extras import require

if TYPE_CHECKING:
    from offmoe.serve.engine import Engine

HOST, PORT = "127.0.0.1", 8321
EVERYWHERE = ("0.0.0.0", "::", "")


def parser() -> options.Parser:
    parser = options.Parser("serve", "Answer the HTTP APIs of OpenAI and Anthropic with one model, until Ctrl-C.")
    options.add_loading(parser)
    add = options.add_option
    group = parser.add_argument_group("serving")
    add(group, "--host", "ADDRESS", f"address to listen at (default: {HOST}, this machine alone)", default=HOST)
    add(group, "--port", "N", f"port to listen at; 0 takes any free one (default: {PORT})", _port, PORT)
    add(group, "--served-model-name", "NAME[,NAME...]", "names that the model answers to (default: MODEL)")
    add(group, "--parallel", "N", "answers computed in turns; the others wait (default: 1)", options.positive, 1)
    add(group, "--queue", "N", "answers that may wait; more get status 429 (default: 32)", options.positive, 32)
    reuse = "keep the KV cache of earlier turns: exact, numeric or off (default: as --exactness)"
    add(group, "--prefix-reuse", "MODE", reuse, default="auto")
    group.add_argument("--strict", action="store_true", help="refuse fields that no API defines")
    group = parser.add_argument_group("access")
    add(group, "--api-key", "KEY", "key that requests have to bring, as a Bearer token or x-api-key (default: none)")
    add(group, "--allow-host", "NAME[,NAME...]", "further host names that the server may be reached by")
    add(group, "--cors-origin", "URL[,URL...]", "origins whose web pages may read answers (default: none)")
    add(group, "--log-format", "FORM", "text or json (default: text)", default="text")
    options.add_cache(parser)
    options.add_state(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    if args.log_format not in ("text", "json"):
        raise ConfigError(f"--log-format {args.log_format} must be text or json.")
    require("serve", "offmoe serve", "openai", "starlette", "uvicorn", python=" on Python 3.11 or later")
    check_state(args)
    from offmoe.cli import prompts
    from offmoe.serve.engine import Engine
    from offmoe.serve.http.app import build_app
    from offmoe.serve.http.guard import Access
    from offmoe.serve.http.live import live_routes
    from offmoe.serve.http.metrics import metrics_route
    from offmoe.serve.http.service import Service
    from offmoe.serve.run import bind
    from offmoe.serve.run import run as serve

    logging.getLogger("offmoe.serve.requests").setLevel(logging.INFO)
    bound = bind(args.host, args.port)
    with bound, open_model(args, out) as opened:
        tokenizer = prompts.tokenizer_of(opened.inspected)
        model, _ = opened.load(warm=True)
        with Engine(
            model, tokenizer, parallel=args.parallel, queue=args.queue, prefix_reuse=args.prefix_reuse
        ) as engine:
            names = _list(args.served_model_name) or [str(args.model)]
            service = Service(engine, names, strict=args.strict)
            access = Access(args.host, args.api_key, _list(args.allow_host), args.log_format == "json")
            app = build_app(
                service, access, _list(args.cors_origin), [metrics_route(engine), *live_routes(engine, names[0])]
            )
            url = _url(args.host, bound.getsockname()[1])
            serve(app, engine, bound, lambda: _say(out, engine, url, names, args))


def _say(out: Output, engine: Engine, url: str, names: list[str], args: argparse.Namespace) -> None:
    reuse = engine.kept.mode
    if reuse != "off":
        reuse += f" in pieces of {engine.chunk} tokens"
    out.note(
        f"serving {names[0]} at {url}/v1 (OpenAI) and {url} (Anthropic); {engine.max_context} tokens of context, "
        f"prefix reuse {reuse}. What it does: {url}/ in a browser. End with Ctrl-C."
    )
    if not engine.tokenizer.chat_template:
        out.note("the model's tokenizer has no chat template: only /v1/completions answers.")
    elif engine.answers is None:
        out.note("how this model writes reasoning and tool calls is not known: answers are plain text.")
    if args.host not in ("127.0.0.1", "::1", "localhost") and args.api_key is None:
        out.note("WARNING: other machines can reach this server and it asks for no key; set --api-key KEY.")
    values: dict[str, Any] = {"url": url, "models": names, "max_context": engine.max_context, "prefix_reuse": reuse}
    out.json(values)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _url(host: str, port: int) -> str:
    name = "127.0.0.1" if host in EVERYWHERE else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

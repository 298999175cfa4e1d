"""Runs the HTTP server of an engine until a signal ends it."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from offmoe.errors import ConfigError
from offmoe.serve.engine import Engine

GRACE_S = 10.0
"""Seconds that running answers get to finish after SIGTERM. After Ctrl-C they get none."""
HEADER_BYTES = 64 << 10
IDLE_S = 75
"""Seconds after which a connection without a request is closed."""


class _Server(uvicorn.Server):
    """uvicorn's server. A signal ends the engine's answers first, since open streams would hold the server up."""

    def __init__(self, config: uvicorn.Config, engine: Engine, on_start: Callable[[], None]):
        super().__init__(config)
        self._engine, self._on_start = engine, on_start
        self._ending: threading.Thread | None = None
        self.is_interrupted = False
        """Whether Ctrl-C was pressed."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.is_interrupted = self.is_interrupted or sig == signal.SIGINT
        grace = GRACE_S if sig == signal.SIGTERM and self._ending is None else 0.0
        self._ending = threading.Thread(target=self._end, args=(sig, frame, grace), name="offmoe-shutdown")
        self._ending.start()

    def _end(self, sig: int, frame: FrameType | None, grace: float) -> None:
        self._engine.close(grace)
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen at {host} port {port}: {reason}; choose another --port or --host.") from error
    return bound


def run(app: ASGIApp, engine: Engine, bound: socket.socket, on_start: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        app: The application.
        engine: Its engine, which is closed at the end.
        bound: The socket to listen at; it is closed at the end.
        on_start: Called once when requests are taken.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",  # what is installed besides, such as by Ray, chooses no other parser with other limits
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=int(GRACE_S),
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    server = _Server(config, engine, on_start)
    # uvicorn raises the signal again when it has ended. The default for SIGTERM would end the process there, before
    # the state of the cache is kept.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
        engine.close()
        bound.close()
    if server.is_interrupted:  # which uvicorn raises again, unless it has ended meanwhile
        raise KeyboardInterrupt

"""A run over lines on the workers of a Ray cluster. Ray schedules, moves rows, and tries again what a worker lost."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
import ray.data
from ray.exceptions import RayError

from offmoe.batch.lines import Line
from offmoe.batch.results import Sink
from offmoe.batch.run import Progress, failed_result
from offmoe.errors import ConfigError, OffmoeError
from offmoe.ray.generator import LINE, Generator

LOCAL, AUTO = "local", "auto"
CONNECT_S = 10.0
"""Seconds in which an address has to take a connection. Ray itself tries for minutes."""
ROWS = 4
"""Lines of one call of a worker, times the rows that it has under way: the last rows of a call run nearly alone."""
WIDTH = 16
"""Rows under way where no number is asked for."""


class Workers(NamedTuple):
    """What a run takes of a cluster: actors, and the processors and GPUs of each."""

    actors: int
    cpus: int
    gpus: int


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Use a cluster while the block runs.

    Args:
        address: "local" starts a cluster of this machine; "auto" finds the one that this machine belongs to; else
            HOST:PORT, or ray://HOST:PORT.

    Raises:
        ConfigError: No cluster answers there.
    """
    _check_address(address)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    starting = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **starting)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"--ray {address}: cannot be used ({_first_line(error)}).") from error
    try:
        yield
    finally:
        ray.shutdown()


def workers(wanted: int | None, device: str | None) -> Workers:
    """Actors for a run on the connected cluster: one per GPU, or per machine without GPUs, with equal shares of it.

    Args:
        wanted: The number of actors; None: as many as there are GPUs or machines.
        device: The device that was asked for; None: the fastest.

    Raises:
        ConfigError: The cluster does not have so many.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    gpus = 0 if (device or "").startswith("cpu") else int(sum(machine.get("GPU", 0) for machine in machines))
    cpus = [int(machine["CPU"]) for machine in machines]
    most = gpus or sum(cpus)
    count = wanted or gpus or len(machines)
    if not 1 <= count <= most:
        raise ConfigError(f"--ray-workers {count}: the cluster has {most} free {'GPUs' if gpus else 'processors'}.")
    per_machine = -(-count // len(machines))
    return Workers(count, max(1, min(cpus) // per_machine), 1 if gpus else 0)


def answer(
    lines: Sequence[Line],
    results: Sink,
    tell: Callable[[Progress], None],
    used: Workers,
    generator: Mapping[str, Any],
) -> None:
    """Answer the lines that have no result yet on the connected cluster. Their errors become results.

    Each result is taken once, whatever Ray computes twice because a worker was lost.

    Args:
        lines: The lines.
        results: Where results go.
        tell: Called after every line.
        used: What to take of the cluster.
        generator: Arguments of `Generator`.

    Raises:
        OffmoeError: The workers cannot go on.
    """
    ended, tokens = 0, 0
    by_number: dict[str, Line] = {}
    for line in lines:
        if results.is_done(line):
            continue
        if line.error is None:
            by_number[f"batch_req_{line.number}"] = line
            continue
        results.add(line, failed_result(line, line.error), failed=True)
        ended += 1
        tell(Progress(ended, tokens))
    if not by_number:
        return
    for row in _answers(list(by_number.values()), used, generator):
        if row["id"] not in by_number:
            continue
        line = by_number.pop(row["id"])
        response, error = json.loads(row["response"]), row["error"]
        result = {**row, "response": response, "error": None if error is None else json.loads(error)}
        results.add(line, result, failed=error is not None)
        ended += 1
        tokens += response["body"].get("usage", {}).get("completion_tokens", 0)
        tell(Progress(ended, tokens))
    if by_number:
        raise OffmoeError(f"Ray ended without results of {len(by_number)} lines; give the command again.")


def _answers(lines: Sequence[Line], used: Workers, generator: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of results, as the workers give them."""
    width = generator.get("batch_size") or WIDTH
    rows = max(1, min(ROWS * width, -(-len(lines) // used.actors)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = 0  # a model that cannot be loaded stays one
    data = ray.data.from_items(
        [
            {LINE: line.number, "custom_id": line.custom_id, "url": line.url, "body": json.dumps(line.body)}
            for line in lines
        ],
        override_num_blocks=-(-len(lines) // rows),
    )
    answered = data.map_batches(
        Generator,
        fn_constructor_kwargs=dict(generator),
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=used.actors),
        num_cpus=used.cpus,
        num_gpus=used.gpus or None,
        scheduling_strategy="SPREAD",
    )
    try:
        for part in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from part.to_pylist()
    except (RayError, RuntimeError) as error:
        raise _error(error) from error


def _error(error: Exception) -> OffmoeError:
    """The error of a worker: offmoe's own if it is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OffmoeError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    # An actor that could not be made leaves a traceback as text.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return OffmoeError(f"Ray's workers cannot go on: {lines[-1] if lines else type(error).__name__}")


def _check_address(address: str) -> None:
    """ConfigError if nothing listens at an address, which Ray would wait for."""
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--ray {address} must be {LOCAL}, {AUTO}, HOST:PORT or ray://HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray {address}: no cluster answers ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    """The beginning of a message that may be long."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

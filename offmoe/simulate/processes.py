"""Runs tasks over several processes. Each process prepares its material once and keeps it for all of its tasks.

The material is sent once per process, a task and its result once per task. Processes are started with "spawn", so they
inherit no threads and no locks. None of them outlives `run_tasks`, nor a parent that was killed.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any, TypeVar

from offmoe.errors import OffmoeError

Raw = TypeVar("Raw")
Material = TypeVar("Material")
Result = TypeVar("Result")


def run_tasks(
    prepare: Callable[[Raw], Material],
    raw: Raw,
    tasks: Sequence[Callable[[Material], Result]],
    jobs: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Compute `task(prepare(raw))` for every task.

    Args:
        prepare, raw, tasks: must be picklable, and so must the results.
        jobs: number of processes. With one job everything runs in this process.
        progress: called with (tasks done, all tasks) after every task.

    Returns:
        The results in the order of the tasks.

    Raises:
        OffmoeError: a process died. An error that a task raises is raised unchanged.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        material = prepare(raw) if tasks else None
        results = []
        for task in tasks:
            results.append(task(material))  # type: ignore[arg-type]  # there is material if there are tasks
            progress(len(results), len(tasks))
        return results
    earlier_children = set(active_children())
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (prepare, raw)) as pool:
        try:
            futures = [pool.submit(_run, task) for task in tasks]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done, len(tasks))
            return [future.result() for future in futures]
        except BaseException as error:
            for child in set(active_children()) - earlier_children:
                child.terminate()  # the pool would wait for the tasks under way
            if isinstance(error, BrokenProcessPool):
                raise OffmoeError("a process of the sweep died (out of memory?); use fewer --jobs.") from None
            raise


class _Worker:
    """What one worker process keeps between its tasks."""

    prepare: Callable[[], Any]
    material: list[Any]


def _start_worker(prepare: Callable[[Raw], Material], raw: Raw) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.prepare, _Worker.material = (lambda: prepare(raw)), []


def _end_with_parent() -> None:
    """A worker cannot see that its parent was killed: it holds both ends of the queue that it waits on."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(task: Callable[[Any], Result]) -> Result:
    if not _Worker.material:  # here and not in _start_worker, so that an error reaches the parent
        _Worker.material.append(_Worker.prepare())
        gc.freeze()  # the material stays until the end; scanning it at every collection would cost a tenth
    return task(_Worker.material[0])

"""Tasks over processes: every process prepares its material once, then works off one task after another.

What moves: the material once per process, a task and a result per task. Processes are started afresh ("spawn"), so that
no threads or locks of the parent come along. Bound: the tasks. Must never leave a process behind, whatever happens."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from typing import TypeVar

from offmoe.errors import OffmoeError

Raw = TypeVar("Raw")
Material = TypeVar("Material")
Result = TypeVar("Result")


def run_tasks(
    prepare: Callable[[Raw], Material],
    raw: Raw,
    tasks: Sequence[Callable[[Material], Result]],
    jobs: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Results of `task(prepare(raw))` in the order of the tasks; all of it must pickle. With one job it happens here.

    An error of a task is raised here; OffmoeError when a process dies."""
    results: dict[int, Result] = {}

    def keep(index: int, result: Result) -> None:
        results[index] = result
        if progress is not None:
            progress(len(results), len(tasks))

    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        material = prepare(raw) if tasks else None
        for index, task in enumerate(tasks):
            keep(index, task(material))  # type: ignore[arg-type]  # there is material where there are tasks
        return [results[index] for index in range(len(tasks))]
    context = get_context("spawn")
    todo = iter(enumerate(tasks))
    processes = []
    pipes: list[connection.Connection] = []
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, prepare, raw), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
            ours.send(next(todo))
        while len(results) < len(tasks):
            for ready in connection.wait(pipes):
                assert isinstance(ready, connection.Connection)
                try:
                    index, result, error = ready.recv()
                except (EOFError, ConnectionError):
                    raise OffmoeError("a process of the sweep died (out of memory?); use fewer --jobs.") from None
                if error is not None:
                    raise error
                keep(index, result)
                following = next(todo, None)
                if following is None:
                    pipes.remove(ready)
                    ready.close()
                else:
                    ready.send(following)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    return [results[index] for index in range(len(tasks))]


def _work(pipe: connection.Connection, prepare: Callable[[Raw], Material], raw: Raw) -> None:
    """Until the other end closes. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    material: list[Material] = []
    while True:
        try:
            index, task = pipe.recv()
        except EOFError:
            return
        try:
            if not material:
                material.append(prepare(raw))
                gc.freeze()  # it stays to the end: looking through it again and again would cost a tenth
            pipe.send((index, task(material[0]), None))
        except Exception as error:  # whatever a task raises is the caller's
            pipe.send((index, None, error))

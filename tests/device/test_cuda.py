"""The order in which CUDA's graphs are captured, on doubles of torch's: nothing of it has run on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offmoe.device.cuda import CudaKind


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What torch.cuda was asked for, in order."""
    calls: list[object] = []

    class Graph:
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            calls.append(("begin", pool, capture_error_mode))

        def capture_end(self) -> None:
            calls.append("end")
            if "broken" in calls:
                raise RuntimeError("the capture was invalidated")

        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def stream(stream: object) -> Iterator[None]:
        calls.append("enter")
        yield
        calls.append("leave")

    side = SimpleNamespace(device="cuda:0", wait_stream=lambda other: calls.append(("wait for", other)))

    def pool() -> int:
        calls.append("pool")
        return calls.count("pool")

    doubles: dict[str, Any] = {
        "CUDAGraph": Graph,
        "Stream": lambda device: side,
        "stream": stream,
        "current_stream": lambda device: "compute",
        "graph_pool_handle": pool,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)
    return calls


def test_a_capture_is_on_a_stream_of_its_own_and_other_threads_go_on(called: list[object]) -> None:
    capturer = CudaKind().capturer(torch.device("cuda", 0))

    def work() -> int:
        called.append("work")
        return 5

    graph, result = capturer.capture(work)
    graph.replay()
    assert result == 5
    begin = ("begin", 1, "thread_local")
    assert called == ["pool", ("wait for", "compute"), "enter", begin, "work", "end", "leave", "replay"]


def test_work_that_fails_ends_its_capture(called: list[object]) -> None:
    def fails() -> None:
        called.append("broken")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaKind().capturer(torch.device("cuda", 0)).capture(fails)
    assert called[-2:] == ["broken", "end"]


def test_graphs_share_a_pool_while_there_are_some(called: list[object]) -> None:
    """torch lets go of a pool with its last graph, and does not take its handle again."""
    capturer = CudaKind().capturer(torch.device("cuda", 0))
    graphs = [capturer.capture(lambda: None)[0] for _ in range(2)]
    assert [call[1] for call in called if isinstance(call, tuple) and call[0] == "begin"] == [1, 1]
    graphs.clear()
    gc.collect()
    capturer.capture(lambda: None)
    assert called.count("pool") == 2

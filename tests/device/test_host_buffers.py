"""Host buffers: separate, aligned, pinned now or in the background, and unpinned once."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offmoe.device.host_buffers import HostBuffers


class TestHostBuffers:
    def test_buffers_are_separate_and_page_aligned(self) -> None:
        buffers = HostBuffers(3, 5000)
        assert (len(buffers), buffers.nbytes) == (3, 8192)
        for i in range(3):
            tensor = buffers.tensor(i)
            assert tensor.dtype is torch.uint8
            assert tensor.shape == (8192,)
            assert tensor.data_ptr() % 4096 == 0
            assert tensor.untyped_storage().data_ptr() == tensor.data_ptr()  # what is_pinned() asks about
            buffers.memory(i)[:] = bytes([i + 1]) * 8192
        assert [buffers.tensor(i).unique().tolist() for i in range(3)] == [[1], [2], [3]]
        buffers.close()

    def test_buffers_are_pinned_and_unpinned_once(self) -> None:
        log: list[tuple[str, int]] = []

        def pin(address: int, nbytes: int) -> bool:
            assert nbytes == 4096
            log.append(("pin", address))
            return True

        pinning: Any = SimpleNamespace(pin=pin, unpin=lambda address: log.append(("unpin", address)))
        buffers = HostBuffers(2, 4096, pinning=pinning)
        addresses = [buffers.tensor(i).data_ptr() for i in range(2)]
        assert [buffers.pinned(i) for i in range(2)] == [True, True]
        buffers.close()
        buffers.close()
        assert log == [("pin", a) for a in addresses] + [("unpin", a) for a in addresses]

    def test_refusal_leaves_the_rest_pageable(self) -> None:
        asked: list[int] = []
        gone: list[int] = []

        def pin(address: int, nbytes: int) -> bool:
            asked.append(address)
            return len(asked) < 2

        pinning: Any = SimpleNamespace(pin=pin, unpin=gone.append)
        buffers = HostBuffers(4, 4096, pinning=pinning)
        assert [buffers.pinned(i) for i in range(4)] == [True, False, False, False]
        assert len(asked) == 2
        buffers.close()
        assert gone == asked[:1]

    def test_an_error_while_pinning_unpins(self) -> None:
        gone: list[int] = []
        calls = iter([True])

        def pin(address: int, nbytes: int) -> bool:
            return next(calls)  # StopIteration the second time

        pinning: Any = SimpleNamespace(pin=pin, unpin=gone.append)
        with pytest.raises(StopIteration):
            HostBuffers(2, 4096, pinning=pinning)
        assert len(gone) == 1

    def test_without_a_device_nothing_is_pinned(self) -> None:
        buffers = HostBuffers(1, 4096)
        assert not buffers.pinned(0)
        buffers.close()

    def test_memory_outlives_close_while_a_tensor_shows_it(self) -> None:
        buffers = HostBuffers(1, 4096)
        tensor = buffers.tensor(0)
        buffers.close()
        gc.collect()
        assert tensor.fill_(3).eq(3).all()

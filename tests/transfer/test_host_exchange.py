"""Rows to the host and back, on a device where no copy lands before its event is waited for."""

from __future__ import annotations

import pytest
import torch

from offmoe.transfer.host_exchange import HostExchange
from offmoe.transfer.waits import WAITS
from tests.doubles import DeferredBackend, PinningBackend, without


def round_trips(waits):
    """Whether the rows of two layers come back doubled."""
    exchange = HostExchange(DeferredBackend(), waits)
    back, wanted = [], []
    for layer in (1.0, 2.0):
        rows = torch.full((3, 5), layer)
        inputs = exchange.to_host(rows)
        results = exchange.results(inputs)
        results.copy_(2 * inputs)
        back.append(exchange.to_device(results).clone())
        wanted.append(2 * rows)
    exchange.close()
    return all(map(torch.equal, back, wanted))


def test_rows_come_back():
    assert round_trips(WAITS)


@pytest.mark.parametrize("wait", ["rows_on_host", "rows_on_device"])
def test_without_the_wait_rows_are_wrong(wait):
    assert not round_trips(without(wait))


def test_buffers_grow_and_are_unpinned():
    backend = PinningBackend()
    exchange = HostExchange(backend)
    for rows in (1, 3000, 2):
        assert exchange.to_host(torch.ones(rows, 64)).sum() == rows * 64
    assert len(backend.pinned) == 2
    exchange.close()
    exchange.close()
    assert not backend.pinned

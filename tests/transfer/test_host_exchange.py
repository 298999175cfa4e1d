"""Rows to the host and back, on a device where nothing has arrived before somebody waited for it."""

from __future__ import annotations

import pytest
import torch

from offmoe.transfer import host_exchange
from tests.doubles import DeferredBackend, DeviceBesideRam, without


def round_trips(module, backend):
    """Whether two layers' rows come back doubled."""
    there = module.HostExchange(backend)
    back, wanted = [], []
    for layer in (1.0, 2.0):
        rows = torch.full((3, 5), layer)
        given = there.to_host(rows)
        results = there.results(given)
        results.copy_(2 * given)
        back.append(there.to_device(results).clone())
        wanted.append(2 * rows)
    there.close()
    return all(map(torch.equal, back, wanted))


def test_rows_come_back():
    assert round_trips(host_exchange, DeferredBackend())


@pytest.mark.parametrize("wait", ["W8", "W9"])
def test_without_the_wait_they_are_wrong(wait):
    assert not round_trips(without(wait, host_exchange), DeferredBackend())


def test_buffers_grow_and_are_unpinned():
    backend = DeviceBesideRam()
    there = host_exchange.HostExchange(backend)
    for rows in (1, 3000, 2):
        assert there.to_host(torch.ones(rows, 64)).sum() == rows * 64
    assert len(backend.pinned) == 2
    there.close()
    there.close()
    assert not backend.pinned

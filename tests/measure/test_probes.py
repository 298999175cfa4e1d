"""Probes on a tiny checkpoint: figures are positive and honest about what they did; errors come through."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from offmoe.device.backend import CpuBackend
from offmoe.errors import ShardChangedError
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.load.config import build_meta, model_class, read_config
from offmoe.measure.probes import DiskProbe, copy_gb_s, host_expert_us, median_s
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import ExpertLayout
from offmoe.storage.store import ExpertStore
from tests import tiny


@pytest.fixture
def store(tmp_path: Path):
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    config = read_config(folder)
    checkpoint = Checkpoint.open(folder)
    catalog = build_catalog(checkpoint, build_meta(config, model_class(config)))
    store = ExpertStore(checkpoint.shards, catalog.records)
    yield store, catalog.records, checkpoint.shards
    store.close()


def test_reads(store) -> None:
    reader, records, shards = store
    calls: list[int] = []
    with closing(DiskProbe(reader, records, shards)) as probe:
        assert probe.at_once == 4
        assert probe.lone_s() > 0
        assert probe.gb_s(0.0) > 0  # a read each, however short the time
        assert probe.gb_s(0.01, meanwhile=lambda: calls.append(1)) > 0
    assert calls


def test_an_error_of_a_reader_is_raised(store) -> None:
    reader, records, shards = store
    with closing(DiskProbe(reader, records, shards)) as probe:
        for shard in shards:
            shard.write_bytes(b"")
        with pytest.raises(ShardChangedError):
            probe.gb_s(0.0)


def test_copies_and_host_computing() -> None:
    assert copy_gb_s(CpuBackend(), 4096, rounds=2) > 0
    layout = ExpertLayout.of({"up": (torch.bfloat16, (8, 4)), "bias": (torch.float32, (8,))})
    us = host_expert_us(layout, tokens=2, rounds=1)
    assert us is not None
    assert us > 0
    assert host_expert_us(ExpertLayout.of({"packed": (torch.uint8, (8, 4))}), tokens=1) is None


def test_the_median_leaves_out_the_first_call_and_what_comes_before(monkeypatch) -> None:
    now = [0.0]
    costs = iter([100.0, 1.0, 50.0, 2.0])
    monkeypatch.setattr("offmoe.measure.probes.time.perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(costs)

    def before() -> None:
        now[0] += 1000

    assert median_s(work, 3, before) == 2.0

"""The probe of a fraction of a second: every figure is there, and it says what it did not measure."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from offmoe.budget.inspect import survey
from offmoe.config import OffloadConfig
from offmoe.measure.quick import probe
from tests import tiny

CPU = OffloadConfig(device="cpu")


def test_a_cpu_is_probed(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral").to(torch.bfloat16), tmp_path / "model")
    state = torch.get_rng_state()
    rates = probe(survey(folder, CPU))
    assert torch.equal(torch.get_rng_state(), state), "a run that follows samples as it would have without"
    assert rates.source.startswith("a probe of this machine in ")
    assert rates.assumed == ()
    for field in fields(rates):
        value = getattr(rates, field.name)
        if field.name.endswith(("_gb_s", "_us", "_ns")) and value is not None:
            assert 0 < value < 1e6, field.name
    assert (rates.link_gb_s, rates.host_gb_s) == (None, None)
    assert rates.copy_gb_s is not None


def test_a_model_without_shards_has_an_assumed_disk(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    rates = probe(survey(folder / "config.json", CPU))
    assert rates.assumed == ("a disk of kind nvme-gen3",)

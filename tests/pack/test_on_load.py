"""experts="int4" of a dense checkpoint: the same model as from a packed folder, and nothing stays on the disk."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.budget.inspect import inspect, survey
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, CheckpointError, ConfigError, TransferError, UnsupportedModelError
from offmoe.pack import on_load
from offmoe.pack.pack import pack, weight_format
from tests import quantized, tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
PROMPT = {"input_ids": tiny.prompt()}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary folders are created in."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.save(tiny.build("mixtral", torch.bfloat16, **SIZES), tmp_path / "dense")


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, **options)
    with model.offload, torch.no_grad():
        return model(**PROMPT).logits


@pytest.mark.parametrize("experts", ["int4", "int8"])
def test_as_from_a_packed_folder(
    checkpoint: Path, tmp_path: Path, temporary: Path, caplog: pytest.LogCaptureFixture, experts: str
) -> None:
    pack(checkpoint, tmp_path / "packed", weight_format(experts))
    right = logits(tmp_path / "packed", experts=experts)
    assert not caplog.records
    model = offmoe.from_pretrained(checkpoint, device="cpu", slots_per_layer=3, experts=experts)
    with model.offload, torch.no_grad():
        assert torch.equal(model(**PROMPT).logits, right)
        assert (model.offload.config.experts, model.offload.config.exactness) == (experts, "numeric")
        assert model.name_or_path == str(checkpoint)
        assert len(list(temporary.iterdir())) == 1
        model.save_pretrained(tmp_path / "saved")
    assert list(temporary.iterdir()) == []
    assert f"offmoe pack {checkpoint} OUT --experts {experts}" in caplog.text
    assert torch.equal(logits(tmp_path / "saved", experts=experts), right)


@pytest.mark.parametrize("experts", ["int4", "int8"])
def test_sizes_are_known_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, temporary: Path, experts: str
) -> None:
    config = OffloadConfig(device="cpu", slots_per_layer=3, experts=experts)
    pack(checkpoint, tmp_path / "packed", weight_format(experts))
    planned, wanted = inspect(checkpoint, config), inspect(tmp_path / "packed", config)
    assert planned.plan.to_dict() | {"budget": 0} == wanted.plan.to_dict() | {"budget": 0}
    assert (planned.needs.experts, planned.shape) == (wanted.needs.experts, wanted.shape)
    assert list(temporary.iterdir()) == []
    alone = tmp_path / "config.json"
    alone.write_bytes((checkpoint / "config.json").read_bytes())
    guessed = survey(alone, config)
    assert guessed.shape.expert_bytes[0] == pytest.approx(planned.shape.expert_bytes[0], rel=0.01)


def test_what_is_quantized_otherwise(tmp_path: Path, checkpoint: Path) -> None:
    pack(checkpoint, tmp_path / "packed", weight_format("int4"))
    fp8, _ = quantized.save(tmp_path, "mixtral", "fp8", **SIZES)
    for folder, experts in ((tmp_path / "packed", "int8"), (fp8, "int4")):
        with pytest.raises(ConfigError, match=r"quantizing what is quantized would only lose more.*experts='native'"):
            inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3, experts=experts))


def test_what_cannot_be_quantized(tmp_path: Path) -> None:
    odd = tiny.save(tiny.build("mixtral", torch.bfloat16), tmp_path / "odd")
    with pytest.raises(UnsupportedModelError, match="experts='native'"):
        logits(odd, experts="int4")


def test_a_disk_without_room(checkpoint: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1000))
    with pytest.raises(CapacityError, match=r"takes .* and 1000 B.* are free in .*set TMPDIR"):
        logits(checkpoint, experts="int4")
    assert list(temporary.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    with pytest.raises(TransferError, match=r"no temporary folder.*gone.*set TMPDIR"):
        logits(checkpoint, experts="int4")


@pytest.mark.parametrize("experts", ["int4", "int8"])
def test_weights_that_are_not_finite(checkpoint: Path, temporary: Path, experts: str) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    weight = tiny.tensor(checkpoint, name)
    weight[5, 6] = float("inf")
    tiny.edit(checkpoint, {name: weight})
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} holds NaN or infinity"):
        logits(checkpoint, experts=experts)
    assert list(temporary.iterdir()) == []


def test_an_interruption_leaves_nothing(checkpoint: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: Any) -> None:
        assert len(list(temporary.iterdir())) == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # while it is written
        patch.setattr(on_load, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(checkpoint, experts="int4")
    assert list(temporary.iterdir()) == []
    with monkeypatch.context() as patch:  # once it is written
        patch.setattr("offmoe.dense_part.load_dense", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(checkpoint, experts="int4")
    assert list(temporary.iterdir()) == []

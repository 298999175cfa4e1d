"""exactness="auto" is numeric where kernels compute with quantized experts as they stand, and bitwise elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.budget.inspect import survey
from offmoe.compute.kernels import device as device_kernels
from offmoe.config import OffloadConfig
from offmoe.device.machines import parse_machine
from offmoe.device.planned import PlannedBackend
from offmoe.pack.pack import pack, weight_format
from tests import native, quantized, tiny

SAID = "exactness='bitwise' gives stock's"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = tiny.build("mixtral", torch.float32, **sizes)
    return tiny.save(model, tmp_path_factory.mktemp("exactness") / "dense")


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The same with int4 experts, which all kernels read."""
    pack(folder, folder.with_name("int4"), weight_format("int4"))
    return folder.with_name("int4")


def run(folder: Path, **options: Any) -> tuple[str, torch.Tensor]:
    """exactness as it was decided, and logits [T, V]."""
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, dtype=torch.float32, **options)
    with model.offload, torch.no_grad():
        return model.offload.config.exactness, model(tiny.prompt(1, 9)).logits[0]


@native.installed
def test_quantized_experts_are_numeric_by_default(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    """D7: every expert was decoded at every use, and the kernels stood by."""
    exactness, logits = run(packed)
    assert exactness == "numeric"
    assert [SAID in record.message for record in caplog.records] == [True]
    caplog.clear()
    asked, same = run(packed, exactness="numeric")
    assert asked == "numeric"
    assert torch.equal(logits, same)
    bitwise, stock = run(packed, exactness="bitwise")
    assert bitwise == "bitwise"
    assert not caplog.records, "nothing is said of what was asked for"
    assert not torch.equal(logits, stock)
    assert (logits - stock).norm() <= 1e-5 * stock.norm()


@native.installed
def test_a_resized_model_stays_numeric(packed: Path) -> None:
    model = offmoe.from_pretrained(packed, device="cpu", slots_per_layer=3, dtype=torch.float32)
    with model.offload, torch.no_grad():
        before = model(tiny.prompt(1, 9)).logits
        model.offload.resize(slots_per_layer=5)
        assert model.offload.config.exactness == "numeric"
        assert torch.equal(model(tiny.prompt(1, 9)).logits, before)


def test_what_no_kernel_reads_stays_bitwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Groups of 8 columns."""
    in_eights, _ = quantized.save(tmp_path, "mixtral", "ct-int4")
    assert run(in_eights)[0] == "bitwise"
    assert SAID not in caplog.text


def test_dense_experts_stay_bitwise(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(folder)[0] == "bitwise"
    assert not caplog.records


@pytest.mark.skipif(not device_kernels.available(), reason="no Triton")
def test_a_gpu_asks_its_own_kernels(packed: Path, folder: Path) -> None:
    gpu = PlannedBackend(parse_machine("rtx-3060"))
    for path, exactness in ((packed, "numeric"), (folder, "bitwise")):
        assert survey(path, OffloadConfig(), backend=gpu).config.exactness == exactness
    assert survey(packed, OffloadConfig(exactness="bitwise"), backend=gpu).config.exactness == "bitwise"

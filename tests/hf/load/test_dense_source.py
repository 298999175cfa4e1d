"""A fetch brings a layer to the device unchanged, from host memory and from shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offmoe.device.backend import CpuBackend
from offmoe.errors import ShardChangedError, TransferError
from offmoe.hf.load.dense_layers import HostImages, ShardTensors
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import ExpertLayout

LAYERS = [
    {"a": torch.randn(7, 33), "b": torch.randn(5).to(torch.bfloat16)},
    {"a": torch.randn(3, 3).to(torch.float16), "c": torch.randn(2, 2, 2)},
]
LAYOUTS = [ExpertLayout.of({n: (t.dtype, tuple(t.shape)) for n, t in layer.items()}) for layer in LAYERS]


def landing(layer: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Device memory full of NaN."""
    memory = CpuBackend().allocate(LAYOUTS[layer].nbytes).fill_(255)
    return memory, LAYOUTS[layer].views(memory)


@pytest.fixture
def sources(tmp_path: Path):
    """Two sources of the same layers: host memory, and two shards of which one is not needed."""
    save_file({f"{i}.{n}": t for i, layer in enumerate(LAYERS) for n, t in layer.items()}, tmp_path / "b.safetensors")
    save_file({"other": torch.zeros(9)}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    segments = [{n: checkpoint.segment(f"{i}.{n}") for n in layer} for i, layer in enumerate(LAYERS)]
    (tmp_path / "a.safetensors").unlink()
    found: list[HostImages | ShardTensors] = [
        HostImages(LAYOUTS, LAYERS, CpuBackend()),
        ShardTensors(checkpoint.shards, segments, CpuBackend()),
    ]
    yield found
    for source in found:
        source.close()


def test_layers_arrive_as_they_were(sources) -> None:
    for source in sources:
        for layer in (1, 0, 1):
            memory, views = landing(layer)
            source.fetch(layer, memory, views)
            assert all(torch.equal(views[name], tensor) for name, tensor in LAYERS[layer].items())


def test_another_dtype_is_cast(tmp_path: Path) -> None:
    stored = {"w": torch.randn(40, 40).to(torch.bfloat16)}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    source = ShardTensors(checkpoint.shards, [{"w": checkpoint.segment("w")}], CpuBackend())
    layout = ExpertLayout.of({"w": (torch.float32, (40, 40))})
    memory = CpuBackend().allocate(layout.nbytes)
    source.fetch(0, memory, layout.views(memory))
    assert torch.equal(layout.views(memory)["w"], stored["w"].float())
    source.close()


def test_a_truncated_shard_is_noticed(sources, tmp_path: Path) -> None:
    with open(tmp_path / "b.safetensors", "r+b") as file:
        file.truncate(10)
    with pytest.raises(ShardChangedError):
        sources[1].fetch(0, *landing(0))
    sources[0].fetch(0, *landing(0))


def test_closed_is_closed(sources) -> None:
    sources[1].close()
    with pytest.raises(TransferError, match="closed"):
        sources[1].fetch(0, *landing(0))

"""Experts packed in the order of the kernels are those packed in rows: same values, same results, one read each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.compute.kernels.library import status
from offmoe.errors import ConfigError, UnsupportedModelError
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.quant_config import read_method
from offmoe.hf.load.config import build_meta, model_class, read_config
from offmoe.pack.pack import pack, weight_format
from offmoe.quant.int_formats import TILES_FORMAT
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly
from offmoe.storage.read_plan import ALIGNMENT, plan_reads
from tests import tiny
from tests.pack.test_pack import run, save

FORMATS = [("int4", 64, False), ("int4", 32, True), ("int8", None, False)]


@pytest.fixture(autouse=True)
def kernels() -> None:
    if status().library is None:
        pytest.skip(status().message)


def both(folder: Path, how: tuple[str, int | None, bool], family: str = "mixtral", **overrides: Any) -> list[Path]:
    """A model packed in rows, and in tiles."""
    source = save(folder / "source", family, **overrides)
    packed = [folder / layout for layout in ("rows", "tiles")]
    losses = [pack(source, out, weight_format(*how), layout=out.name, shard_bytes=40_000).layers for out in packed]
    assert losses[0] == losses[1]
    return packed


def results(folder: Path, slots: int = 3, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=slots, **options)
    with model.offload:
        return run(model)


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("exactness", ["bitwise", "numeric"])
def test_both_layouts_compute_the_same_bits(tmp_path: Path, how: tuple[str, int | None, bool], exactness: str) -> None:
    rows, tiles = (results(folder, exactness=exactness) for folder in both(tmp_path, how))
    assert torch.equal(rows[0], tiles[0])
    assert torch.equal(rows[1], tiles[1])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    rows, tiles = (results(folder, exactness="numeric") for folder in both(tmp_path, FORMATS[0], family))
    assert torch.equal(rows[0], tiles[0])


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("inner", [64, 80 * 16 + 64])  # planes of 16 rows that are no multiple of a slot's alignment
def test_an_expert_is_one_extent_with_the_bytes_of_a_slot(
    tmp_path: Path, how: tuple[str, int | None, bool], inner: int
) -> None:
    _, folder = both(tmp_path, how, intermediate_size=inner)
    config = read_config(folder)
    meta = build_meta(config, model_class(config))
    checkpoint = Checkpoint.open(folder)
    catalog = build_catalog(checkpoint, meta).for_kernels(meta)
    assert catalog.formats == (f"offmoe tiles {how[0]}",)
    for layer in catalog.layers:
        assert layer.cpu_slot is not None
        assert layer.assembly.convert is None
        assert layer.assembly.write is None
        for record in layer.records:
            first = record.segments[0].offset
            assert first % ALIGNMENT == 0
            assert [s.offset - first for s in record.segments] == [p.offset for p in layer.layout.params]
            windows = [window for part in plan_reads(record).parts for window in part]
            assert len(windows) == 1
            assert windows[0].nbytes < layer.layout.nbytes + ALIGNMENT


def test_slots_take_the_bytes_as_they_come(tmp_path: Path) -> None:
    for folder, unmoved in zip(both(tmp_path, FORMATS[0]), (False, True), strict=True):
        config = read_config(folder)
        meta = build_meta(config, model_class(config))
        for layer in build_catalog(Checkpoint.open(folder), meta).for_kernels(meta).layers:
            slot = torch.empty(layer.layout.nbytes, dtype=torch.uint8)
            runs = Assembly.runs(layer.assembly, layer.records[0].segments, layer.layout.views(slot))
            assert all((run is not None) is unmoved for run in runs)


def test_what_was_packed_in_one_layout_is_not_continued_in_the_other(tmp_path: Path) -> None:
    both(tmp_path, FORMATS[0])
    with pytest.raises(ConfigError, match="with other options"):
        pack(tmp_path / "source", tmp_path / "tiles", weight_format("int4"), shard_bytes=40_000)


def test_there_are_two_layouts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'rows' or 'tiles'"):
        pack(save(tmp_path / "source"), tmp_path / "out", weight_format("int4"), layout="columns")


def test_a_reader_that_does_not_know_the_format_refuses_it(tmp_path: Path) -> None:
    _, folder = both(tmp_path, FORMATS[0])
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert values["format"] == TILES_FORMAT
    config = read_config(folder)
    config.quantization_config = values | {"format": "offmoe-tiles-v2"}
    with pytest.raises(UnsupportedModelError, match="'offmoe-tiles-v2'"):
        read_method(folder, config)


def test_experts_that_computation_waits_for_are_read_into_their_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # planes and extents of whole pages, as experts of real models have them
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    folders = both(tmp_path, ("int4", 32, False), **sizes)
    options: dict[str, Any] = {"exactness": "numeric", "slots": tiny.NUM_EXPERTS}  # so that none waits for its slot
    wanted = results(folders[0], **options)
    copied: list[int] = []
    monkeypatch.setattr("offmoe.device.backend.copy_in_ram", lambda into, data: copied.append(data.nbytes))
    got = results(folders[1], **options)
    assert copied == []
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])

"""Experts whose tensors several modules share: divided lists and tied parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offmoe.errors import CheckpointError, MissingTensorError
from tests import families, tiny
from tests.hf.catalog.test_build import assert_same_experts, open_catalog

UP = "model.layers.1.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize("original_format", [True, False], ids=["original", "fused"])
def test_text_and_image_experts_of_one_list(tmp_path: Path, original_format: bool) -> None:
    model = families.build("ernie4_5_vl_moe", torch.bfloat16)
    tiny.save(model, tmp_path, original_format)
    catalog = assert_same_experts(tmp_path, model)
    text, image = catalog.layers[:2]
    assert (text.name.split(".")[-2], image.name.split(".")[-2]) == ("text_moe", "vision_moe")
    assert text.records[0].nbytes > image.records[0].nbytes
    assert not text.assembly.convert
    assert not image.assembly.convert
    if original_format:
        names = [segment.name for segment in image.records[3].segments]
        assert all(".experts.11." in name for name in names), names


@pytest.mark.parametrize("expert", [2, 13])
def test_tensor_missing_in_a_divided_list_is_named(tmp_path: Path, expert: int) -> None:
    tiny.save(families.build("ernie4_5_vl_moe"), tmp_path)
    tiny.edit(tmp_path, {UP.format(expert): None})
    with pytest.raises(MissingTensorError, match=UP.format(expert)):
        open_catalog(tmp_path)


def test_expert_too_many_in_a_divided_list_is_refused(tmp_path: Path) -> None:
    tiny.save(families.build("ernie4_5_vl_moe"), tmp_path)
    tiny.edit(tmp_path, {UP.format(16): torch.zeros(16, 32)})
    with pytest.raises(CheckpointError, match="17 tensors like"):
        open_catalog(tmp_path)


def test_tied_experts_are_read_from_the_tensors_that_are_there(tmp_path: Path) -> None:
    model = families.build("diffusion_gemma", torch.bfloat16)
    tiny.save(model, tmp_path)
    catalog = assert_same_experts(tmp_path, model)
    encoder, decoder = catalog.layers[:3], catalog.layers[3:]
    for one, other in zip(encoder, decoder, strict=True):
        for a, b in zip(one.records, other.records, strict=True):
            assert set(a.segments) == set(b.segments)

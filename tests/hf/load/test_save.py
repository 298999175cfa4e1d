"""`save_pretrained` of a model without experts: the whole checkpoint, or nothing and an error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from offmoe.errors import ConfigError, ShardChangedError
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.load.config import build_meta, model_class, read_config
from offmoe.hf.load.save import attach_safe_save
from offmoe.storage.checkpoint import Checkpoint
from tests import tiny
from tests.hf.load import test_load


def load(folder: Path, **options: Any) -> tiny.Model:
    model = test_load.load(folder, **options)
    config = read_config(folder)
    attach_safe_save(model, folder, build_catalog(Checkpoint.open(folder), build_meta(config, model_class(config))))
    return model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny.save(tiny.build("mixtral", torch.bfloat16), tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def model(source: Path) -> tiny.Model:
    return load(source)


def test_saved_folder_is_a_whole_model_for_stock(source: Path, model: tiny.Model, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    model.save_pretrained(out)
    ids = tiny.prompt()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(source)(input_ids=ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits, wanted)
    assert {p.name for p in out.iterdir()} == {p.name for p in source.iterdir()} - {"training.bin"}
    model.save_pretrained(out)  # over itself


def test_model_loaded_in_another_dtype_saves_the_source(source: Path, tmp_path: Path) -> None:
    load(source, dtype=torch.float32).save_pretrained(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("state_dict", {}),
        ("push_to_hub", True),
        ("max_shard_size", "5GB"),
        ("variant", "fp16"),
        ("save_original_format", False),
        ("safe_serialization", False),
        ("repo_id", "owner/model"),
    ],
)
def test_option_that_needs_rewriting_is_refused(model: tiny.Model, tmp_path: Path, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        model.save_pretrained(tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()


def test_options_that_copying_fulfils_are_accepted(model: tiny.Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out", True, push_to_hub=False, state_dict=None, safe_serialization=True)
    assert (tmp_path / "out" / "config.json").exists()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_changed_weight_is_not_lost_silently(model: tiny.Model, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight.*changed since loading"):
        model.save_pretrained(tmp_path / "out")


def test_replaced_weight_is_not_lost_silently(model: tiny.Model, tmp_path: Path) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        model.save_pretrained(tmp_path / "out")


def test_added_weight_is_not_lost_silently(model: tiny.Model, tmp_path: Path) -> None:
    model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ConfigError, match="'adapter'"):
        model.save_pretrained(tmp_path / "out")


def test_changed_config_is_not_lost_silently(model: tiny.Model, tmp_path: Path) -> None:
    model.config.rms_norm_eps = 0.5
    with pytest.raises(ConfigError, match=r"config\.rms_norm_eps"):
        model.save_pretrained(tmp_path / "out")


def test_using_the_model_is_no_change(source: Path, model: tiny.Model, tmp_path: Path) -> None:
    from tests.hf.load.test_load import lend

    lend(model, AutoModelForCausalLM.from_pretrained(source))
    model.generate(tiny.prompt(), max_new_tokens=3, do_sample=False)
    model.requires_grad_(False)
    model.save_pretrained(tmp_path / "out")


def test_changed_generation_config_is_saved(model: tiny.Model, tmp_path: Path) -> None:
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == 77


def test_deep_copy_does_not_save_in_the_name_of_its_original(model: tiny.Model, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    with pytest.raises(ConfigError, match="changed since loading"):
        twin.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")


def test_source_itself_is_refused(source: Path, model: tiny.Model) -> None:
    with pytest.raises(ConfigError, match="own source"):
        model.save_pretrained(source)


def test_folder_with_another_checkpoint_is_refused(model: tiny.Model, tmp_path: Path) -> None:
    tiny.save(tiny.build("olmoe"), tmp_path / "out", max_shard_size="1GB")
    with pytest.raises(ConfigError, match=r"another checkpoint \(model\.safetensors\)"):
        model.save_pretrained(tmp_path / "out")


def test_source_that_lost_its_experts_is_refused(source: Path, model: tiny.Model, tmp_path: Path) -> None:
    for file in source.glob("*.safetensors*"):
        file.unlink()
    stripped = PreTrainedModel.save_pretrained  # what stock would write
    stripped(model, source)
    with pytest.raises(ShardChangedError, match="lost experts"):
        model.save_pretrained(tmp_path / "out")


def test_failed_copy_leaves_no_checkpoint(source: Path, model: tiny.Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "config.json").mkdir(parents=True)  # the last files cannot be written
    with pytest.raises(OSError, match=r"config\.json"):
        model.save_pretrained(out)
    assert not list(out.glob("*.partial"))

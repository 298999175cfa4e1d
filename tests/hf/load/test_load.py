"""Models load without their experts: nothing else is missing, and no expert is ever in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3VLMoeConfig, ViTConfig, core_model_loading
from transformers.utils import logging

from offmoe.errors import CheckpointError, ConfigError, MissingTensorError, UnsupportedModelError
from offmoe.hf.adapters.find import expert_parameters, find_experts
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.load.config import build_meta, model_class, read_config
from offmoe.hf.load.load import load_dense, require_index
from offmoe.hf.upstream import ALL_EXPERTS_FUNCTIONS
from offmoe.storage.checkpoint import Checkpoint
from tests import tiny

BORROWED = "offmoe-test-borrowed"


def borrowed_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute with the stock module that `lend` attached to this one."""
    return module.__dict__["lender"](hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(BORROWED, borrowed_forward)


def lend(model: tiny.Model, stock: tiny.Model) -> tiny.Model:
    """Let the experts of `stock` compute for `model`."""
    for module, lender in zip(find_experts(model).values(), find_experts(stock).values(), strict=True):
        module.__dict__["lender"] = lender
    return model


def load(folder: Path, **options: Any) -> tiny.Model:
    config = read_config(folder)
    cls = model_class(config)
    catalog = build_catalog(Checkpoint.open(folder), build_meta(config, cls))
    return load_dense(folder, config, cls, catalog, device="cpu", experts_implementation=BORROWED, **options)


@pytest.mark.parametrize("original_format", [True, False], ids=["original", "fused"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_everything_but_the_experts_is_as_in_stock(tmp_path: Path, family: str, original_format: bool) -> None:
    tiny.save(tiny.build(family, torch.bfloat16), tmp_path, original_format)
    cls = model_class(read_config(tmp_path))
    stock = cls.from_pretrained(tmp_path, experts_implementation="eager").eval()
    model = load(tmp_path)

    assert type(model) is cls
    assert not model.training
    there, wanted = model.state_dict(), stock.state_dict()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert there.keys() == wanted.keys() - expert_parameters(stock).keys()
    for name, tensor in there.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name
    stock_buffers = dict(stock.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, stock_buffers[name]), name

    with torch.no_grad():
        ids = tiny.prompt()
        assert torch.equal(lend(model, stock)(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_no_expert_is_ever_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that the loader takes from the shards passes one function of it."""
    tiny.save(tiny.build("mixtral"), tmp_path)
    read: list[tuple[int, ...]] = []
    materialize = core_model_loading._materialize_copy

    def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = materialize(tensor, *args, **kwargs)
        read.append(tuple(out.shape))
        return out

    monkeypatch.setattr(core_model_loading, "_materialize_copy", watched)
    model = load(tmp_path)
    assert sorted(read) == sorted(tuple(tensor.shape) for tensor in model.state_dict().values())


def test_class_is_left_as_it_was(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    cls = model_class(read_config(tmp_path))
    ignored = cls._keys_to_ignore_on_load_unexpected
    init = cls.__init__
    model = load(tmp_path)
    assert cls.__init__ is init
    assert cls._keys_to_ignore_on_load_unexpected is ignored
    assert type(model) is cls
    assert cls.from_pretrained(tmp_path).state_dict().keys() - model.state_dict().keys()  # stock still loads experts


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.bfloat16), (torch.float32, torch.float32), ("float16", torch.float16)],
    ids=["own", "float32", "float16"],
)
def test_dtype_is_of_the_dense_weights(tmp_path: Path, dtype: torch.dtype | str | None, expected: torch.dtype) -> None:
    tiny.save(tiny.build("qwen3_moe", torch.bfloat16), tmp_path)
    model = load(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}


def test_missing_dense_weight_is_never_made_up(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {"model.layers.1.self_attn.q_proj.weight": None})
    with pytest.raises(MissingTensorError, match=r"'model\.layers\.1\.self_attn\.q_proj\.weight'"):
        load(tmp_path)


def test_only_experts_are_left_out_of_the_report_of_unexpected_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save(tiny.build("qwen2_moe"), tmp_path)
    tiny.edit(tmp_path, {"model.layers.1.mlp.shared_expert.extra_experts.weight": torch.zeros(2)})
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        load(tmp_path)
    finally:
        logging.disable_propagation()
        logging.set_verbosity(verbosity)
    assert "shared_expert.extra_experts" in caplog.text
    assert "gate_up_proj" not in caplog.text


@pytest.mark.parametrize("option", ["device_map", "key_mapping", "state_dict", "quantization_config", "variant"])
def test_options_behind_the_catalogs_back_are_refused(tmp_path: Path, option: str) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    with pytest.raises(ConfigError, match=option):
        load(tmp_path, **{option: "x"})


def test_option_that_transformers_does_not_know_is_a_config_error(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    with pytest.raises(ConfigError, match="nonsense"):
        load(tmp_path, nonsense=1)


def test_options_of_transformers_are_passed_on(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    assert load(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        (None, CheckpointError, "is not there; give the folder of a complete model"),
        ("{", CheckpointError, "not JSON"),
        ("[]", CheckpointError, "not a JSON object"),
        ("{}", CheckpointError, "model_type"),
        ('{"model_type": ["mixtral"]}', CheckpointError, "model_type"),
        ("[" * 100_000, CheckpointError, "not JSON"),
        ('{"model_type": "nonsense"}', UnsupportedModelError, "nonsense"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}', UnsupportedModelError, "own code"),
        ('{"model_type": "mixtral", "num_local_experts": "eight"}', CheckpointError, "not a valid config"),
    ],
)
def test_bad_config_is_named(tmp_path: Path, text: str | None, error: type[Exception], match: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=match):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("num_hidden_layers", 2**31, "'num_hidden_layers' is 2147483648, not a number up to 10000"),
        ("num_hidden_layers", float("nan"), "'num_hidden_layers' is nan"),
        ("num_local_experts", 10**30, "'num_local_experts' is 10{30}, not a number up to 100000"),
        ("text_config", {"num_layers": 10**6}, "'num_layers' is 1000000"),
        ("eos_token_id", "</s>", "'eos_token_id' is '</s>', not a token id or a list of them"),
    ],
)
def test_config_beyond_any_model_builds_nothing(tmp_path: Path, name: str, value: object, match: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", name: value}))
    with pytest.raises(CheckpointError, match=match):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"eos_token_id": "</s>"}', "'eos_token_id' is '</s>', not a token id or a list of them"),
        ('{"eos_token_id": [2, [3]]}', "'eos_token_id' is"),
        ('{"pad_token_id": [0]}', r"'pad_token_id' is \[0\], not a token id;"),
        ('{"bos_token_id": 1e3}', "'bos_token_id' is 1000.0"),
        ('{"eos_token_id": 99999999999999999999}', "'eos_token_id' is"),
        ('{"suppress_tokens": ["a"]}', "not a list of token ids"),
        ('{"num_beams": "4"}', "'num_beams' is '4', not a whole number"),
        ('{"temperature": NaN}', "'temperature' is nan, not a number"),
        ("[]", "not a JSON object"),
    ],
)
def test_generation_config_that_generate_could_not_use(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{match}"):
        read_config(tmp_path)


def test_generation_config_of_real_models_passes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    text = (
        '{"eos_token_id": [2, 7], "pad_token_id": -1, "bos_token_id": null, "temperature": 1, "top_p": 0.9, "top_k": 0}'
    )
    (tmp_path / "generation_config.json").write_text(text)
    assert read_config(tmp_path).model_type == "mixtral"


def test_model_without_a_text_generating_class_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="ViTConfig"):
        model_class(ViTConfig())


def test_vision_config_prefers_the_class_with_images() -> None:
    assert model_class(Qwen3VLMoeConfig()).__name__ == "Qwen3VLMoeForConditionalGeneration"


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 0}, {"hidden_size": -4}, {"hidden_act": "nonsense"}, {"pad_token_id": 9999}],
    ids=lambda change: next(iter(change)),
)
def test_config_that_describes_no_model_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    config = read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: does not describe a MixtralForCausalLM"):
        build_meta(config, model_class(config))


def test_nothing_of_the_model_stays_in_the_shards(tmp_path: Path) -> None:
    """Truncating a shard under a mapping would end the process."""
    stock = tiny.build("mixtral")
    model = load(tiny.save(stock, tmp_path))
    for shard in tmp_path.glob("*.safetensors"):
        with open(shard, "r+b") as file:
            file.write(b"\xff" * shard.stat().st_size)
            file.truncate(100)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, stock.get_parameter(name)), name


def test_shards_without_an_index_are_refused_before_loading(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    require_index(Checkpoint.open(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingTensorError, match=r"neither model\.safetensors nor"):
        require_index(Checkpoint.open(tmp_path))


def test_meta_model_has_shapes_and_no_bytes(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    config = read_config(tmp_path)
    before = config.to_dict()
    meta = build_meta(config, model_class(config))
    assert all(p.is_meta for p in meta.parameters())
    assert config.to_dict() == before

"""Other configurations than the checkpoint's: they act as in stock transformers, or are refused truthfully."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

import offmoe
from offmoe.config import OffloadConfig
from offmoe.errors import ConfigError
from offmoe.hf.load.options import OURS, UNUSABLE, sort_options
from offmoe.hf.load.overrides import ConfigChange, changed_config
from tests import families, tiny

IDS = tiny.prompt(2, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral", torch.bfloat16), tmp_path_factory.mktemp("overrides") / "model")


def both(folder: Path, **options: Any) -> tuple[tiny.Model, tiny.Model]:
    stock = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})
    return tiny.comparable(stock), offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, **options)


ACCEPTED: list[dict[str, Any]] = [
    {"use_cache": False},
    {"output_router_logits": True},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 3},
    {"sliding_window": 4},
    {"max_position_embeddings": 4096},
    {"pad_token_id": 3},
    {"num_hidden_layers": 2},
    {"num_hidden_layers": 1, "num_experts_per_tok": 1},
    {"output_hidden_states": True},
    {"output_attentions": True, "attn_implementation": "eager"},
    {"attn_implementation": "eager"},
    {"tie_word_embeddings": True},
    {"rms_norm_eps": 1e-3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"torch_dtype": torch.float32},
    {"torch_dtype": "float32"},
    {"config": None},
    {"quantization_config": None, "subfolder": "", "variant": None, "device_map": None, "low_cpu_mem_usage": True},
    {"trust_remote_code": True},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=lambda options: ",".join(options))
def test_a_value_acts_as_in_stock(folder: Path, options: dict[str, Any]) -> None:
    stock, ours = both(folder, **options)
    with ours.offload, torch.no_grad():
        assert ours.config.to_dict() == stock.config.to_dict()
        assert ours.generation_config.to_dict() == stock.generation_config.to_dict()
        there, wanted = ours(input_ids=IDS), stock(input_ids=IDS)
        assert torch.equal(there.logits, wanted.logits)
        if options.get("output_router_logits"):
            assert all(torch.equal(a, b) for a, b in zip(there.router_logits, wanted.router_logits, strict=True))
        for name in ("hidden_states", "attentions"):
            if options.get(f"output_{name}"):
                pairs = zip(getattr(there, name), getattr(wanted, name), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
        tokens = [model.generate(IDS, max_new_tokens=4, do_sample=False) for model in (ours, stock)]
        assert torch.equal(*tokens)
        top_k = options.get("num_experts_per_tok", tiny.TOP_K)
        assert ours.offload.memory().slots_per_layer == (3,) * options.get("num_hidden_layers", 3)
        assert ours.offload.stats().demands > 0
        assert {layer.num_experts_per_tok for layer in [ours.config]} == {top_k}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_fewer_layers_than_layer_types_names(tmp_path: Path, family: str) -> None:
    sizes: dict[str, Any] = {"intermediate_size": 32} if family == "gpt_oss" else {}  # fp32 has stock's bits there
    stock, ours = both(tiny.save(tiny.build(family, **sizes), tmp_path), num_hidden_layers=2)
    with ours.offload, torch.no_grad():
        assert len(ours.config.layer_types) == 3
        assert torch.equal(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits)
        assert torch.equal(*(model.generate(IDS, max_new_tokens=4, do_sample=False) for model in (ours, stock)))


def test_the_plan_is_of_the_changed_model(folder: Path) -> None:
    def planned(**options: Any) -> int:
        with offmoe.from_pretrained(folder, device="cpu", max_context=64, **options).offload as offload:
            return offload.memory().smallest

    assert planned(num_hidden_layers=1) < planned(num_hidden_layers=2) < planned()
    assert planned(num_experts_per_tok=1) < planned()


@pytest.mark.parametrize("kind", ["object", "folder", "file"])
def test_another_configuration(folder: Path, tmp_path: Path, kind: str) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.num_experts_per_tok = 1
    config.save_pretrained(tmp_path)
    given = {"object": config, "folder": str(tmp_path), "file": tmp_path / "config.json"}[kind]
    before = config.to_dict()
    stock, ours = both(folder, config=config)
    with offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, config=given).offload as offload:
        model = offload  # closed with the block; the model of `both` is compared
        assert model.memory().slots_per_layer == (3, 3, 3)
    with ours.offload, torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    assert config.to_dict() == before


def test_a_configuration_object_needs_no_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    (tmp_path / "config.json").unlink()
    (tmp_path / "generation_config.json").unlink()
    given = GenerationConfig(eos_token_id=2)
    with offmoe.from_pretrained(tmp_path, device="cpu", config=config, generation_config=given).offload as offload:
        assert offload.memory().slots_per_layer == (8, 8, 8)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"nonsense": 1}, "'nonsense' is no option of offmoe, .* nor a value of MixtralConfig"),
    ({"num_expert_per_token": 1}, r"\(did you mean 'num_experts_per_tok'\?\)"),
    ({"to_dict": 1}, "'to_dict' is no option"),
    ({"__class__": int}, "'__class__' is no option"),
    ({"num_hidden_layers": 4}, "num_hidden_layers=4: the checkpoint holds no such model: .*layers.3"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be a number up to 10000"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers='two'"),
    ({"num_local_experts": 16}, "num_local_experts=16: the checkpoint holds no such model"),
    ({"num_experts_per_tok": 99}, "num_experts_per_tok=99: the checkpoint holds no such model"),
    ({"hidden_size": 64}, "hidden_size=64: the checkpoint holds no such model"),
    ({"hidden_act": "nonsense"}, "hidden_act='nonsense'"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id or a list"),
    ({"attn_implementation": "nonsense"}, "attn_implementation='nonsense'"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2'"),
    ({"output_attentions": True, "attn_implementation": "sdpa"}, "output_attentions=True"),
    ({"model_type": "nonsense"}, "model_type='nonsense'"),
    ({"config": "/no/such/folder"}, "there is no such folder or file"),
    ({"config": CONFIG_MAPPING["mixtral"](), "use_cache": False}, "set config.use_cache on the object"),
    ({"subfolder": "nowhere"}, "has no such folder"),
    ({"subfolder": ["a"]}, r"subfolder=\['a'\] must be a text"),
    ({"revision": 1}, "revision=1 must be a text"),
    *(({name: object()}, f"option '{name}' of transformers") for name in sorted({*OURS, *UNUSABLE})),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[",".join(options) for options, _ in REFUSED])
def test_what_stock_would_do_silently_or_cannot_do_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("offmoe.api.fetch", refuse)
    with pytest.raises(ConfigError, match=message) as caught:
        offmoe.from_pretrained(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_not_blamed_on_an_option(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tiny.edit(tmp_path, {"model.layers.1.block_sparse_moe.experts.3.w1.weight": None})
    with pytest.raises(offmoe.errors.MissingTensorError, match=r"experts\.3\.w1"):
        offmoe.from_pretrained(tmp_path, device="cpu", use_cache=False)


def test_a_subfolder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "inner" / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner/model", dtype="auto")
    ours: tiny.Model = offmoe.from_pretrained(tmp_path, device="cpu", subfolder="inner/model")
    with ours.offload, torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, tiny.comparable(stock)(input_ids=IDS).logits)


def test_a_checkpoint_with_a_generate_of_its_own(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    with pytest.raises(ConfigError, match=r"has a generate\(\) of its own"):
        offmoe.from_pretrained(tmp_path, device="cpu", trust_remote_code=True)
    offmoe.from_pretrained(tmp_path, device="cpu").offload.close()  # type: ignore[attr-defined, unused-ignore]


def test_saving_keeps_the_changed_values(folder: Path, tmp_path: Path) -> None:
    model: tiny.Model = offmoe.from_pretrained(folder, device="cpu", num_hidden_layers=2, num_experts_per_tok=1)
    with model.offload, torch.no_grad():
        model.save_pretrained(tmp_path)
        logits = model(input_ids=IDS).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    with torch.no_grad():
        assert torch.equal(tiny.comparable(again)(input_ids=IDS).logits, logits)


def is_value(config: PreTrainedConfig, name: str, value: object) -> bool:
    """Whether stock takes it as a keyword: not if layers may differ in it, nor if JSON spells it in another way."""
    try:
        return hasattr(config, name) and "__float__" not in str(value)
    except AmbiguousGlobalPerLayerAttributeError:
        return False


@pytest.mark.parametrize("family", sorted(families.CONFIGS))
def test_every_value_of_a_configuration_is_a_keyword(tmp_path: Path, family: str) -> None:
    """None is taken for an option of ours, or for an argument of a function of ours or of transformers."""
    config = AutoConfig.for_model(family, **families.CONFIGS[family])
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    values = {name: value for name, value in stored.items() if name != "dtype" and is_value(config, name, value)}
    assert len(values) > 4
    change = sort_options(values).change
    assert change.values == values
    assert changed_config(tmp_path, change).to_dict() == AutoConfig.from_pretrained(tmp_path, **values).to_dict()


def test_no_option_of_ours_hides_a_value_of_a_configuration() -> None:
    options = {*OffloadConfig.__dataclass_fields__, *OURS, *UNUSABLE, "offload_config", "trace", "model"}
    names = set()
    for model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model_type]
        names |= {*getattr(config, "__dataclass_fields__", ()), *config.attribute_map}
    assert len(names) > 1000
    assert names & options == {"quantization_config"} & names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_configuration_without_a_dtype_means_that_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny.save(tiny.build("mixtral", dtype), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: v for name, v in values.items() if name != "dtype"}))
    stock, ours = both(tmp_path)
    with ours.offload, torch.no_grad():
        assert ours.dtype == stock.dtype == dtype
        assert torch.equal(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits)


def test_messages_name_the_keywords() -> None:
    change = ConfigChange("somewhere", {"num_experts_per_tok": 1})
    assert str(change) == "config='somewhere', num_experts_per_tok=1"
    assert not ConfigChange()

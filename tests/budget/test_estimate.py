"""What a configuration alone tells: the published sizes of real models, and the very bytes that headers give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

import offmoe
from offmoe.budget.estimate import estimate, estimate_experts
from offmoe.budget.inspect import Inspected, inspect, survey
from offmoe.budget.needs import model_needs
from offmoe.config import OffloadConfig
from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.hf.load.config import build_meta, model_class
from tests import tiny

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
CPU = OffloadConfig(device="cpu", device_memory=1 << 50)


@pytest.mark.parametrize(
    ("name", "total", "dense", "layers", "moe_layers", "experts", "top_k"),
    [
        ("mixtral-8x7b", 46.7, 1.6, 32, 32, 8, 2),
        ("mixtral-8x22b", 140.6, 5.3, 56, 56, 8, 2),
        ("deepseek-v2", 235.7, 13.0, 60, 59, 160, 6),
        ("deepseek-v3", 671.0, 17.1, 61, 58, 256, 8),
        ("qwen3-30b-a3b", 30.5, 1.5, 48, 48, 128, 8),
        ("gpt-oss-120b", 116.8, 2.1, 36, 36, 128, 4),
        ("switch-c-2048", 1571.5, 1.1, 15, 30, 2048, 1),
    ],
)
def test_published_sizes(
    name: str, total: float, dense: float, layers: int, moe_layers: int, experts: int, top_k: int
) -> None:
    surveyed = survey(CONFIGS / f"{name}.json", CPU)
    assert (round(surveyed.needs.parameters.total / 1e9, 1), round(surveyed.needs.parameters.dense / 1e9, 1)) == (
        total,
        dense,
    )
    assert surveyed.shape.layers == moe_layers
    assert surveyed.hf_config.get_text_config().num_hidden_layers == layers
    assert set(surveyed.shape.experts) == {experts}
    assert set(surveyed.shape.top_k) == {top_k}
    assert surveyed.plan.dense >= 2 * surveyed.needs.parameters.dense, "computed in bf16"
    assert surveyed.plan.slots_per_layer == surveyed.shape.experts, "a petabyte holds all of them"


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("mixtral-8x7b", 3 * 4096 * 14336 * 2),
        # a byte per weight, a float32 per block of 128 x 128
        ("deepseek-v3", 3 * 2048 * 7168 + 3 * (2048 // 128) * (7168 // 128) * 4),
        # 17 bytes per 32 weights, biases in bf16
        ("gpt-oss-120b", 3 * 2880 * 2880 // 32 * 17 + 3 * 2880 * 2),
    ],
)
def test_bytes_of_an_expert_as_published(name: str, expert: int) -> None:
    surveyed = survey(CONFIGS / f"{name}.json", CPU)
    assert set(surveyed.shape.expert_bytes) == {expert}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_configuration_says_what_the_headers_say(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = tiny.save(tiny.build(family, dtype), tmp_path / "model")
    read = inspect(folder, CPU)
    estimated = survey(folder / "config.json", CPU)
    assert not isinstance(estimated, Inspected)
    assert (estimated.shape, estimated.needs.parameters, estimated.dtype) == (
        read.shape,
        read.needs.parameters,
        read.dtype,
    )
    assert [e.slot for e in estimated.needs.experts] == [e.slot for e in read.needs.experts]
    assert estimated.plan.slots_per_layer == read.plan.slots_per_layer
    fixed = [(p.dense, p.slots, p.workspace) for p in (estimated.plan, read.plan)]
    assert fixed[0] == fixed[1]


def _config(folder: Path, family: str, **quantization: object) -> Path:
    config = tiny.build(family, torch.bfloat16).config.to_dict()
    path = folder / "config.json"
    path.write_text(json.dumps({**config, "quantization_config": quantization}))
    return path


@pytest.mark.parametrize(
    ("quantization", "expert"),
    [
        # mixtral here: gate and up are 48 x 32, down is 32 x 48
        ({"quant_method": "fp8", "weight_block_size": [32, 32]}, 3 * 48 * 32 + 4 * 3 * 2),
        ({"quant_method": "fp8"}, 3 * 48 * 32 + 4 * 3),
        ({"quant_method": "fp8", "modules_to_not_convert": ["experts"]}, 3 * 48 * 32 * 2),
        # codes, scales and zeros per group, and where columns are reordered, their order
        (
            {"quant_method": "awq", "bits": 4, "group_size": 16},
            3 * 48 * 32 // 2 + 2 * (48 * 2 * 2 + 48) + 2 * 32 * 3 + 48,
        ),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": 16},
            3 * 48 * 32 + 2 * (48 * 2 * 3) + 32 * 3 * 3 + 4 * (32 + 32 + 48),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16, "symmetric": True}}},
            },
            3 * 48 * 32 // 2 + 2 * (48 * 2 * 2) + 32 * 3 * 2 + 3 * 16,
        ),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_bytes_of_quantized_experts(tmp_path: Path, quantization: dict[str, object], expert: int) -> None:
    surveyed = survey(_config(tmp_path, "mixtral", **quantization), CPU)
    assert set(surveyed.shape.expert_bytes) == {expert}
    assert surveyed.quantization == quantization["quant_method"]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("switch_transformers", {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 4, "num_decoder_layers": 2}),
        ("nllb-moe", {"d_model": 32, "encoder_layers": 4, "decoder_layers": 2, "encoder_sparse_step": 2}),
    ],
)
def test_many_experts_are_counted_without_making_them(family: str, sizes: dict[str, int]) -> None:
    """Needs that are extrapolated from two and three experts to 70 equal those of a model with 70."""
    config = AutoConfig.for_model(family, num_heads=4, vocab_size=97, num_experts=70, **sizes)
    cls = model_class(config)
    estimated, _ = estimate(config, cls, torch.float32, torch.float32, unified_memory=True)
    meta = build_meta(config, cls)
    shape, experts = estimate_experts(meta, torch.float32)
    assert estimated == model_needs(meta, shape, experts, torch.float32, torch.float32, unified_memory=True)
    assert set(shape.experts) == {70}


def test_many_experts_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
        counts.append(config.num_experts)
        return build_meta(config, cls)

    monkeypatch.setattr("offmoe.budget.estimate.build_meta", counted)
    config = AutoConfig.for_model("switch_transformers", num_experts=2048)
    estimate(config, model_class(config), torch.float32, torch.float32, unified_memory=True)
    assert max(counts) == 3


def test_a_quantization_of_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'hqq'.*download the checkpoint"):
        survey(_config(tmp_path, "mixtral", quant_method="hqq"), CPU)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    with pytest.raises(UnsupportedModelError, match="no experts"):
        survey(tmp_path, CPU)


def test_a_folder_with_a_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "mixtral-8x7b.json").read_text())
    assert survey(tmp_path, CPU).needs.parameters.total == 46_702_792_704
    with pytest.raises(MissingTensorError, match=r"no \*\.safetensors"):
        offmoe.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a file, not a model"):
        offmoe.from_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_damaged_checkpoint_is_no_configuration(tmp_path: Path, name: str) -> None:
    """To take it for a configuration would hide that the download failed."""
    (tmp_path / "config.json").write_text((CONFIGS / "mixtral-8x7b.json").read_text())
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError):
        survey(tmp_path, CPU)


def test_memory_that_is_not_here_can_be_asked_about() -> None:
    plan = survey(CONFIGS / "mixtral-8x7b.json", OffloadConfig(device="cpu", device_memory=24 << 40)).plan
    assert plan.budget == 24 << 40

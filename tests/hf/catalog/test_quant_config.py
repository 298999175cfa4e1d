"""Configs of quantized checkpoints: what is understood, and every refusal with its reason and remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offmoe.errors import CheckpointError, OffmoeError, UnsupportedModelError
from offmoe.hf.catalog.quant_config import read_method
from offmoe.quant.codec import Codec, Spec
from offmoe.quant.float_formats import Mxfp4, ScaledFloat
from offmoe.quant.int_formats import Awq, Gptq, PackedInt
from tests import quantized


def method(**values: Any):
    return read_method("model", SimpleNamespace(quantization_config=values))


def codec(values: dict[str, Any], name: str = "model.layers.3.mlp.experts.5.up_proj.weight", /, **specs: Spec) -> Codec:
    return method(**values).codec(name, specs, lambda component: b"")


I32 = torch.int32


def test_no_config_is_no_method() -> None:
    assert read_method("model", SimpleNamespace()) is None
    assert read_method("model", SimpleNamespace(quantization_config=None)) is None


def test_the_text_part_of_a_config_counts() -> None:
    text = SimpleNamespace(quantization_config={"quant_method": "mxfp4"})
    assert read_method("model", SimpleNamespace(get_text_config=lambda: text)) is not None


def test_codecs_follow_the_config() -> None:
    assert codec({"quant_method": "fp8", "weight_block_size": [128, 64]}) == ScaledFloat((128, 64))
    assert codec({"quant_method": "fp8"}) == ScaledFloat(None)
    assert codec({"quant_method": "mxfp4"}) == Mxfp4()
    assert codec({"quant_method": "awq", "bits": 4, "group_size": 64}) == Awq(64)
    assert codec({"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"}) == Awq(None)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert codec(gptq) == Gptq(4, 128, ordered=False, reordered=False)
    with_index = {"qweight": Spec((64, 8), I32), "g_idx": Spec((256,), I32)}
    assert codec({**gptq, "desc_act": True, "checkpoint_format": "gptq_v2"}, **with_index) == Gptq(8, 128, True, False)
    uniform = {"qweight": Spec((32, 8), I32), "g_idx": Spec((256,), I32)}
    assert codec(gptq, **uniform) == Gptq(4, 128, ordered=True, reordered=False)
    assert codec({**gptq, "dynamic": {"x": {}}}, **uniform) == Gptq(4, 128, ordered=True, reordered=True)
    assert codec(quantized.ct_config(4, True)) == PackedInt(4, 8)
    assert codec(quantized.ct_config(8, False)) == PackedInt(8, 8, symmetric=False)
    assert codec(quantized.ct_config(4, True, strategy="channel", group_size=None)) == PackedInt(4, None)
    ordered = quantized.ct_config(4, True, actorder="group")
    assert codec(ordered, g_idx=Spec((64,), I32)) == PackedInt(4, 8, ordered=True)


def test_groups_of_compressed_tensors_are_told_by_their_targets() -> None:
    config = quantized.ct_config(4, True)
    eight = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    config["config_groups"] |= {
        "attention": {"targets": ["re:.*self_attn.*"], "weights": eight, "format": "float-quantized"}
    }
    assert codec(config, "model.layers.3.self_attn.q_proj.weight") == ScaledFloat((128, 128))
    assert codec(config) == PackedInt(4, 8)
    config["config_groups"]["again"] = {"targets": ["Linear"], "weights": {**eight, "strategy": "tensor"}}
    with pytest.raises(OffmoeError, match="'pack-quantized' with 8-bit float"):
        codec(config)
    config["config_groups"]["again"]["format"] = "float-quantized"
    with pytest.raises(ValueError, match="2 of the config's groups"):
        codec(config)


CT = quantized.ct_config(4, True)
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"quant_method": "hqq"}, "'hqq'"),
    "no method": ({"bits": 4}, "'None'"),
    "GPTQ for marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin'"),
    "GPTQ marlin flag": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "repacked for one kernel"),
    "AWQ gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout 'gemv'"),
    "AWQ exllama": ({"quant_method": "awq", "bits": 4, "version": "exllama"}, "layout 'exllama'"),
    "AWQ in 8 bits": ({"quant_method": "awq", "bits": 8}, "AWQ in 8 bits"),
    "AWQ without zeros": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "without zero points"),
    "bitsandbytes in 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits"),
    "sparse 2:4": ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "marlin-24": ({**CT, "format": "marlin-24"}, "'marlin-24'"),
    "NVFP4": ({**CT, "format": "nvfp4-pack-quantized"}, "nvfp4"),
    "3 bits": (quantized.ct_config(3, True), "3-bit int"),
    "per token": (quantized.ct_config(4, True, strategy="token"), "by token"),
    "rotations": ({**CT, "transform_config": {"config_groups": {"R1": {}}}}, "rotations"),
    "NVFP4 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt'"),
    "GGUF": ({"quant_method": "gguf"}, "'gguf'"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_decoded_is_refused_by_name(case: str) -> None:
    values, match = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModelError, match=f"model: .*{match}.*use another quantization of the model"):
        method(**values)


def test_gptq_in_3_bits_is_refused_where_its_tensors_say_so() -> None:
    specs = {"qweight": Spec((24, 8), I32), "g_idx": Spec((256,), I32)}
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight' is GPTQ in 3 bits"):
        codec({"quant_method": "gptq", "bits": 4}, **specs)
    with pytest.raises(UnsupportedModelError, match="GPTQ in 3 bits"):
        codec({"quant_method": "gptq", "bits": 3, "group_size": 8})


@pytest.mark.parametrize(
    "values",
    [
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}},
        quantized.ct_config(4, True, actorder="group"),
    ],
)
def test_an_order_of_columns_without_its_index_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="g_idx, which says the order of its columns"):
        codec(values)


@pytest.mark.parametrize(
    "values",
    [
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": "many"},
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"]}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": 3}},
    ],
)
def test_a_config_that_makes_no_sense_is_the_checkpoints_fault(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config of config\.json is not one of"):
        method(**values)

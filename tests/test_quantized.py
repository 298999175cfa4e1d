"""Quantized checkpoints compute what their dequantized weights compute, and only their raw bytes move."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils.quantization_config import Mxfp4Config

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.cli.trace import _parameters
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, MissingTensorError
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from tests import families, quantized, tiny

CASES = [
    ("fp8", "deepseek_v3"),
    ("fp8", "qwen3_moe"),
    ("fp8", "mixtral"),
    ("ct-int4", "qwen3_moe"),
    ("ct-int4", "mixtral"),
    ("ct-int4-asym", "qwen3_moe"),
    ("ct-int8", "mixtral"),
    ("awq", "qwen3_moe"),
    ("awq", "mixtral"),
    ("gptq", "qwen3_moe"),
    ("gptq", "mixtral"),
    ("gptq-int8-desc-act", "qwen3_moe"),
    ("nf4", "mixtral"),
    ("nf4", "qwen3_moe"),
    ("nf4-nested", "qwen3_moe"),
    ("mxfp4", "gpt_oss"),
]
OVERRIDES: dict[str, dict[str, Any]] = {"mxfp4": {"intermediate_size": 32}}
PROMPT = {"input_ids": tiny.prompt()}
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def run(model: tiny.Model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(**PROMPT).logits, model.generate(**PROMPT, **GREEDY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_logits_and_tokens_are_those_of_the_dequantized_model(
    tmp_path: Path, kind: str, family: str, dtype: torch.dtype
) -> None:
    folder, dense = quantized.save(tmp_path, family, kind, **OVERRIDES.get(kind, {}))
    wanted = run(AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval())
    ours = offmoe.from_pretrained(
        folder, device="cpu", exactness="bitwise", slots_per_layer=3, dtype=dtype, trace=tmp_path / "run.npz"
    )
    with ours.offload:
        logits, tokens = run(ours)
        stats = ours.offload.stats()
    assert torch.equal(logits, wanted[0])
    assert torch.equal(tokens, wanted[1])
    trace = read_trace(tmp_path / "run.npz")
    assert trace.options is not None
    assert replay(trace, trace.options).stats == stats


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_fp8_equals_stock_on_the_same_file(tmp_path: Path, family: str) -> None:
    """On a CPU stock dequantizes FP8 to bf16; in fp32 its layers disagree about dtypes.

    Blocks divide all matrices here, because stock reads ragged ones wrong.
    """
    folder, _ = quantized.save(tmp_path, family, "fp8")
    wanted = run(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())
    ours = offmoe.from_pretrained(folder, device="cpu", exactness="bitwise", slots_per_layer=2)
    with ours.offload:
        assert ours.offload.config.exactness == "bitwise"
        got = run(ours)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_mxfp4_equals_stock_on_the_same_file(tmp_path: Path) -> None:
    folder, _ = quantized.save(tmp_path, "gpt_oss", "mxfp4", intermediate_size=32)
    config = Mxfp4Config(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    wanted = run(stock.eval())
    ours = offmoe.from_pretrained(folder, device="cpu", exactness="bitwise", slots_per_layer=2)
    with ours.offload:
        got = run(ours)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.")  # how stock is told to dequantize
@pytest.mark.parametrize("kind", ["ct-int4", "ct-int8"])  # stock cannot convert experts with zero points
def test_compressed_tensors_equals_stock_on_the_same_file(tmp_path: Path, kind: str) -> None:
    """Stock needs the package to read these; offmoe does not."""
    pytest.importorskip("compressed_tensors")
    folder, _ = quantized.save(tmp_path, "qwen3_moe", kind)
    config = CompressedTensorsConfig(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    wanted = run(stock.eval())
    ours = offmoe.from_pretrained(folder, device="cpu", exactness="bitwise", slots_per_layer=3)
    with ours.offload:
        got = run(ours)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_only_raw_bytes_move_and_stand_in_slots(tmp_path: Path) -> None:
    folder, dense = quantized.save(tmp_path, "mixtral", "ct-int4", hidden_size=128, intermediate_size=256)
    sizes = {}
    for path in (folder, dense):
        model = offmoe.from_pretrained(
            path, device="cpu", exactness="bitwise", slots_per_layer=3, dtype=torch.bfloat16, prefetch=0
        )
        with model.offload:
            run(model)
            stats = model.offload.stats()
            sizes[path] = stats.h2d_bytes / stats.misses, model.offload.memory().slots
    # half a byte and a scale of two bytes for 8 columns: 0.75 bytes a weight; float32 in the dense checkpoint
    weights = 3 * 128 * 256
    assert sizes[dense] == (weights * 4, 3 * 3 * weights * 4)
    assert sizes[folder][0] == weights * 0.75
    assert sizes[folder][1] == 3 * 3 * weights * 0.75


def test_parameters_are_counted_as_if_nothing_were_quantized(tmp_path: Path) -> None:
    folder, dense = quantized.save(tmp_path, "mixtral", "gptq")
    counts = []
    for path in (folder, dense):
        inspected = inspect(path, OffloadConfig(device="cpu", slots_per_layer=2), dtype=torch.bfloat16)
        counts.append(_parameters(inspected))
    assert counts[0] == counts[1]
    assert counts[0].expert == (3 * 32 * 48,) * 3


@pytest.mark.parametrize("family", ["longcat_flash", "diffusion_gemma"])
def test_parameters_of_an_expert_are_its_own(tmp_path: Path, family: str) -> None:
    """Stacks may have rows for experts that compute nothing, and layers may share their weights."""
    model = tiny.random_model(families.config(family), torch.bfloat16)
    inspected = inspect(tiny.save(model, tmp_path / "model"), OffloadConfig(device="cpu", slots_per_layer=4))
    sizes = [layer.layout.nbytes for layer in inspected.catalog.layers]
    assert [2 * count for count in _parameters(inspected).expert] == pytest.approx(sizes, abs=1024)


def test_workspace_holds_the_expert_that_is_decoded(tmp_path: Path) -> None:
    folder, dense = quantized.save(tmp_path, "mixtral", "fp8", hidden_size=128, intermediate_size=256)
    workspaces = []
    for path in (folder, dense):
        model = offmoe.from_pretrained(path, device="cpu", exactness="bitwise", slots_per_layer=3, dtype=torch.float32)
        with model.offload as offload:
            workspaces.append(offload.memory().workspace)
    assert workspaces[0] - workspaces[1] >= 3 * 128 * 256 * 4


def test_a_model_is_what_the_class_says_and_saves_its_source(tmp_path: Path) -> None:
    folder, dense = quantized.save(tmp_path, "qwen3_moe", "fp8")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": [2, 7]}))
    stock: tiny.Model = AutoModelForCausalLM.from_pretrained(dense)
    model: tiny.Model = offmoe.from_pretrained(folder, device="cpu", exactness="bitwise", slots_per_layer=2)
    with model.offload:
        assert type(model) is type(stock)
        assert not getattr(model, "is_quantized", False)
        assert not hasattr(model.config, "quantization_config")
        assert model.generation_config.eos_token_id == [2, 7]
        assert model.generate(**PROMPT, do_sample=False).shape[1] <= PROMPT["input_ids"].shape[1] + 3
        assert model.config.name_or_path == model.name_or_path == str(folder)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model.to(torch.bfloat16)
        model.save_pretrained(tmp_path / "copy")
    for file in folder.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes(), file.name


def test_dense_layers_that_do_not_fit_come_decoded(tmp_path: Path) -> None:
    """Quantized dense layers are decoded into a temporary file; the others are read from their shards."""
    folder, dense = quantized.save(tmp_path, "mixtral", "fp8", num_hidden_layers=4)
    wanted = run(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).eval())
    with pytest.raises(CapacityError) as raised:
        offmoe.from_pretrained(folder, device="cpu", exactness="bitwise", device_memory=1, max_context=64)
    needed = re.search(r"model is (\d+) bytes", str(raised.value))
    assert needed is not None
    smallest = int(needed[1])
    model = offmoe.from_pretrained(folder, device="cpu", exactness="bitwise", device_memory=smallest, max_context=64)
    with model.offload:
        assert model.offload.memory().offloaded_layers > 0
        got = run(model)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_tied_embeddings_and_biases_stay_as_they_are(tmp_path: Path) -> None:
    folder, dense = quantized.save(
        tmp_path, "qwen2_moe", "gptq", tie_word_embeddings=True, qkv_bias=True, shared_expert_intermediate_size=24
    )
    wanted = run(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).eval())
    ours = offmoe.from_pretrained(folder, device="cpu", exactness="bitwise", slots_per_layer=2)
    with ours.offload:
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        got = run(ours)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_a_dense_weight_that_is_gone_is_named(tmp_path: Path) -> None:
    folder, _ = quantized.save(tmp_path, "mixtral", "awq")
    stem = "model.layers.1.self_attn.v_proj"
    tiny.edit(folder, {f"{stem}.{part}": None for part in ("qweight", "qzeros", "scales")})
    with pytest.raises(MissingTensorError, match=stem):
        offmoe.from_pretrained(folder, device="cpu", exactness="bitwise", slots_per_layer=2)

"""Quantised checkpoints compute what their dequantised weights compute, and only their raw bytes move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.simulator import replay
from offmoe.trace import read_trace
from tests import quantised, tiny

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
OVERRIDES: dict[str, dict[str, object]] = {"mxfp4": {"intermediate_size": 32}}
PROMPT = {"input_ids": tiny.prompt()}
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def run(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(**PROMPT).logits, model.generate(**PROMPT, **GREEDY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_logits_and_tokens_are_those_of_the_dequantised_model(
    tmp_path: Path, kind: str, family: str, dtype: torch.dtype
) -> None:
    folder, dense = quantised.save(tmp_path, family, kind, **OVERRIDES.get(kind, {}))
    wanted = run(AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval())
    ours = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, dtype=dtype, trace=tmp_path / "run.npz")
    with ours.offload:
        logits, tokens = run(ours)
        stats = ours.offload.stats()
    assert torch.equal(logits, wanted[0])
    assert torch.equal(tokens, wanted[1])
    trace = read_trace(tmp_path / "run.npz")
    assert replay(trace, trace.options).stats == stats

"""Under torch.autocast, whatever the dtype of the weights: the same bits as stock, alone, in a Trainer and prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

import offmoe
from offmoe.compute.kernels.library import status
from offmoe.device.backend import CpuBackend
from offmoe.hf.load.config import model_class, read_config
from tests import families, quantized, tiny

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWER = (torch.bfloat16, torch.float16)

IN_REGISTRY = ("mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3")
OUTSIDE = ("llama4", "dbrx", "jetmoe", "longcat_flash", "step3p7", "switch_transformers", "nllb-moe")
WITH_LAYER_NORM = ("dbrx", "nllb-moe")
"""torch's layer_norm raises on a CPU for inputs of one half precision and weights of the other, in stock too."""


def stock(folder: Path, dtype: torch.dtype) -> tiny.Model:
    model = model_class(read_config(folder)).from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    for weight in [*model.parameters(), *model.buffers()]:  # out of the mapped file, where addresses are not aligned
        weight.data = weight.data.clone()
    return model


def logits(model: tiny.Model, inputs: dict[str, torch.Tensor], autocast: torch.dtype | None) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        return model(**inputs).logits


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2; not less than anything where a number is not finite."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture
def _index_add_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all families only dbrx adds rows up without casting them to the sum's dtype, so with fp32 weights it raises.

    What is asked of offmoe there is what stock would give if dbrx cast as the others do.
    """
    index_add_ = torch.Tensor.index_add_

    def casting(self: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return index_add_(self, dim, index, source.to(self.dtype))

    monkeypatch.setattr(torch.Tensor, "index_add_", casting)


@pytest.mark.usefixtures("_index_add_casts")
@pytest.mark.parametrize("autocast", LOWER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [*IN_REGISTRY, *OUTSIDE])
def test_logits_are_those_of_stock(tmp_path: Path, family: str, dtype: torch.dtype, autocast: torch.dtype) -> None:
    folder = tiny.save(families.build(family, dtype), tmp_path / "model")
    reference = stock(folder, dtype)
    model = offmoe.from_pretrained(folder, slots_per_layer=3)
    with model.offload:
        for inputs in (families.inputs(family), families.inputs(family, batch=1, length=1)):
            if family in WITH_LAYER_NORM and dtype not in (torch.float32, autocast):
                for either in (reference, model):
                    with pytest.raises(RuntimeError, match="mixed dtype"):
                        logits(either, inputs, autocast)
            else:
                assert torch.equal(logits(model, inputs, autocast), logits(reference, inputs, autocast))


@pytest.mark.parametrize("autocast", LOWER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", ["native", "int8", "int4"])
def test_kernels_compute_under_it_too(tmp_path: Path, dtype: torch.dtype, autocast: torch.dtype, experts: str) -> None:
    """As far from float32 without autocast as stock is from its own, which is what autocast costs; a half more at most.

    Every token takes all experts: a choice that rounding changes would be a larger difference than any rounding.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_experts_per_tok": tiny.NUM_EXPERTS}
    folder = tiny.save(tiny.build("mixtral", dtype, **sizes), tmp_path / "model")
    several, one = {"input_ids": tiny.prompt()}, {"input_ids": tiny.prompt(1, 1)}

    def ours(dtype: torch.dtype, autocast: torch.dtype | None) -> list[torch.Tensor]:
        model = offmoe.from_pretrained(
            folder, slots_per_layer=tiny.NUM_EXPERTS, exactness="numeric", experts=experts, dtype=dtype
        )
        with model.offload:
            return [logits(model, inputs, autocast) for inputs in (several, one)]

    exact, found = ours(torch.float32, None), ours(dtype, autocast)
    for i, inputs in enumerate((several, one)):
        cost = error(logits(stock(folder, dtype), inputs, autocast), logits(stock(folder, torch.float32), inputs, None))
        assert error(found[i], exact[i]) < 1.5 * cost


@pytest.mark.parametrize("autocast", LOWER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "family"), [("fp8", "mixtral"), ("ct-int4", "qwen3_moe"), ("nf4", "mixtral")])
def test_quantized_checkpoints_give_the_bits_of_their_values(
    tmp_path: Path, kind: str, family: str, dtype: torch.dtype, autocast: torch.dtype
) -> None:
    folder, dense = quantized.save(tmp_path, family, kind)
    reference = stock(dense, dtype)
    model = offmoe.from_pretrained(folder, slots_per_layer=3, dtype=dtype, exactness="bitwise")
    with model.offload:
        for ids in (tiny.prompt(), tiny.prompt(1, 1)):
            inputs = {"input_ids": ids}
            assert torch.equal(logits(model, inputs, autocast), logits(reference, inputs, autocast))


@pytest.mark.parametrize("autocast", LOWER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_host_computes_its_part(
    tmp_path: Path, dtype: torch.dtype, autocast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever computes a row of several tokens rounds it to their dtype. The host's kernels sum in another order."""
    monkeypatch.setattr(CpuBackend, "unified_memory", False)  # as on a GPU, where the host has work of its own
    folder = tiny.save(tiny.build("mixtral", dtype, hidden_size=64, intermediate_size=64), tmp_path / "model")

    def ours(on_miss: str, slots: int) -> tuple[list[torch.Tensor], int]:
        model = offmoe.from_pretrained(
            folder, slots_per_layer=slots, exactness="numeric", experts="int8", on_miss=on_miss, prefetch=0
        )
        with model.offload:
            prompts = [tiny.prompt(1, 2, seed) for seed in range(4)]
            return [logits(model, {"input_ids": ids}, autocast) for ids in prompts], model.offload.stats().host_computed

    wanted, found = ours("fetch", tiny.NUM_EXPERTS), ours("cpu", 2)
    assert found[1] > 0
    for got, right in zip(found[0], wanted[0], strict=True):
        assert got.dtype == right.dtype
        assert (got - right).float().norm() <= (0 if status().library is None else 0.02) * right.float().norm()


def test_trainer_evaluates_and_predicts(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    ids = tiny.prompt(3)
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    options: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "eval_strategy": "no"}

    def run(model: tiny.Model) -> tuple[float, torch.Tensor]:
        trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), bf16=True, **options), eval_dataset=data)
        return trainer.evaluate()["eval_loss"], torch.as_tensor(trainer.predict(data).predictions)

    loss, predictions = run(stock(folder, torch.float32))
    model = offmoe.from_pretrained(folder, slots_per_layer=3)
    with model.offload:
        found, made = run(model)
    assert found == loss
    assert torch.equal(made, predictions)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_prepared_by_accelerate(tmp_path: Path, precision: str) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = precision  # fp16 is refused for training on a CPU, not for what is asked here
    wanted = accelerator.prepare_model(stock(folder, torch.float32), evaluation_mode=True)
    model = offmoe.from_pretrained(folder, slots_per_layer=3)
    with model.offload, torch.no_grad():
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        assert torch.equal(prepared(tiny.prompt()).logits, wanted(tiny.prompt()).logits)

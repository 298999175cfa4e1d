"""Which modules of a model the C kernels compute, and that nothing else of the model changes."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe import steps
from offmoe.budget import resolve
from offmoe.budget.inspect import inspect
from offmoe.budget.resolve import divide
from offmoe.compute.dense_linear import DenseKernels
from offmoe.compute.kernels.cpu import Rows
from offmoe.compute.kernels.library import KernelStatus, status
from offmoe.compute.kernels.token_router import TokenRouter
from offmoe.config import OffloadConfig
from offmoe.device.backend import CpuBackend
from offmoe.errors import CapacityError, ConfigError
from offmoe.hf.load.kernel_linears import LinearForward, dense_formats, saved_bytes
from tests import tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]


@pytest.fixture(autouse=True)
def kernels() -> None:
    if status().library is None:
        pytest.skip(status().message)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = SIZES | {"head_dim": 32, "moe_intermediate_size": 64, "vocab_size": 128}
    return tiny.save(tiny.build("qwen3_moe", torch.bfloat16, **sizes), tmp_path_factory.mktemp("qwen3") / "dense")


def load(folder: Path, **options: Any) -> Any:
    return offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, **options)


def computed(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module.forward, LinearForward)]


def test_projections_and_head_are_computed_by_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    run = DenseKernels.run

    def counted(self: DenseKernels, rows: Rows, x: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(rows, TokenRouter):
            calls.append(tuple(x.shape))
        return run(self, rows, x)

    monkeypatch.setattr(DenseKernels, "run", counted)
    model = load(folder, exactness="numeric")
    with model.offload, torch.no_grad():
        names = computed(model)
        assert {f"model.layers.{layer}.{name}" for layer in range(2) for name in ATTENTION} < set(names)
        assert ("lm_head" in names) == (model.config.vocab_size % 16 == 0)
        model(input_ids=torch.tensor([[3]]))
        assert len(calls) == len(names)


def test_bitwise_models_are_as_they_were(folder: Path) -> None:
    model = load(folder)
    with model.offload:
        assert not computed(model)


def test_logits_are_those_of_the_bitwise_mode_up_to_rounding(folder: Path) -> None:
    """A tiny model's own rounding in bf16 is 1e-2 of the logits' norm."""
    logits = {}
    for exactness in ("bitwise", "numeric"):
        model = load(folder, exactness=exactness)
        with model.offload, torch.no_grad():
            logits[exactness] = [model(input_ids=ids).logits.float() for ids in (tiny.prompt(), tiny.prompt()[:, :1])]
    for right, got in zip(logits["bitwise"], logits["numeric"], strict=True):
        assert ((got - right).norm() / right.norm()).item() < 3e-2


@pytest.mark.parametrize(("form", "head"), [("int8", "int8"), ("int4", "int8")])
def test_quantized_dense_weights(folder: Path, form: str, head: str) -> None:
    """Routers and embeddings stay; logits follow the bitwise ones as far as the format's error allows."""
    found = inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3, dense=form))
    formats = dense_formats(found.meta, form, {})
    assert formats["lm_head"].kind == head
    assert {how.kind for name, how in formats.items() if name != "lm_head"} == {form}
    assert not any(name.endswith(".gate") or "embed" in name for name in formats)
    right = load(folder)
    with right.offload, torch.no_grad():
        expected = right(input_ids=tiny.prompt()).logits.float()
    model = load(folder, dense=form)
    with model.offload, torch.no_grad():
        assert model.offload.config.exactness == "numeric"
        assert set(computed(model)) == formats.keys()
        absent = {name for name, parameter in model.named_parameters() if parameter.is_meta}
        assert absent == {f"{name}.weight" for name in formats}
        got = model(input_ids=tiny.prompt()).logits.float()
    assert ((got - expected).norm() / expected.norm()).item() < (0.1 if form == "int8" else 0.5)


def test_the_plan_counts_quantized_weights(folder: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "slots_per_layer": 3, "exactness": "numeric"}
    native, packed = (inspect(folder, OffloadConfig(**options, dense=form)) for form in ("native", "int4"))
    saved = sum(saved_bytes(native.meta, "int4", torch.bfloat16, {}).values())
    assert saved > 0
    assert native.plan.dense - packed.plan.dense == saved
    assert packed.needs.bytes.loading == native.plan.dense
    model = load(folder, exactness="numeric", dense="int4")
    with model.offload:
        resident = sum(p.nbytes for p in [*model.parameters(), *model.buffers()] if not p.is_meta)
        formats = dense_formats(packed.meta, "int4", {})
        quantized = sum(how.nbytes(*model.get_submodule(n).weight.shape) for n, how in formats.items())
        assert resident + quantized <= packed.plan.dense


def test_memory_for_loading_is_asked_for(folder: Path) -> None:
    needs = inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3, dense="int4")).needs
    large = needs._replace(bytes=replace(needs.bytes, loading=1 << 30))
    config = OffloadConfig(device="cpu", dense="int4", device_memory=(1 << 30) - 1)
    with pytest.raises(CapacityError, match=str(1 << 30)):
        divide(config, large, CpuBackend(), 1 << 40)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantized_dense_weights_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    with pytest.raises(ConfigError, match=f"dense='{form}'"):
        load(folder, dense=form, exactness="bitwise")
    monkeypatch.setattr(resolve, "status", lambda: KernelStatus(None, "they were not built"))
    with pytest.raises(ConfigError, match="they were not built"):
        load(folder, dense=form)


def test_the_model_is_freed_and_its_layers_are_not_copied(folder: Path) -> None:
    model = load(folder, exactness="numeric")
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(layer)
    assert type(layer) is torch.nn.Linear
    reference = weakref.ref(model)
    model.offload.close()
    del model, layer
    gc.collect()
    assert reference() is None


def test_a_compiled_layer_is_torchs(folder: Path) -> None:
    model = load(folder, exactness="numeric")
    with model.offload, torch.no_grad():
        layer = model.model.layers[0].self_attn.q_proj
        x = torch.randn(1, 64).bfloat16()
        compiled = torch.compile(layer, backend="eager")
        assert torch.equal(compiled(x), torch.nn.functional.linear(x, layer.weight))
        with pytest.raises(RuntimeError, match=r"shape|size"):
            layer(torch.randn(1, 32).bfloat16())


@pytest.mark.parametrize(
    ("tokens", "past", "threads"),
    [(1, 8, 1), (4, 8, 1), (5, 8, 2), (2, 40, 2), (1, 40, 1)],
    ids=["one", "four", "five", "two in a context", "one in a context"],
)
def test_torch_has_one_thread_for_a_few_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, past: int, threads: int
) -> None:
    monkeypatch.setattr(steps, "MOST_KV_BYTES", 16 * 2 * 2 * 32 * 2)  # 16 tokens of 2 heads of 32 in bf16
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        model = load(folder, exactness="numeric")
        with model.offload, torch.no_grad():
            cache = model(tiny.prompt(1, past), use_cache=True).past_key_values
            model.model.norm.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
            model(tiny.prompt(1, tokens), past_key_values=cache)
        assert seen == [threads]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_torch_has_its_threads_where_it_computes_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss has sinks, which the kernels' attention has not."""
    monkeypatch.setattr(steps, "MOST_KV_BYTES", 1)
    sizes = SIZES | {"head_dim": 32, "vocab_size": 128}
    tiny.save(tiny.build("gpt_oss", torch.bfloat16, **sizes), tmp_path)
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        model = load(tmp_path, exactness="numeric")
        with model.offload, torch.no_grad():
            assert computed(model)
            model.model.norm.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
            model(tiny.prompt(1, 1))
        assert seen == [2]
    finally:
        torch.set_num_threads(before)


def test_attention_is_grouped_in_numeric_mode_alone(folder: Path) -> None:
    for exactness, implementation in (("numeric", "offmoe_sdpa"), ("bitwise", "sdpa")):
        model = load(folder, exactness=exactness)
        with model.offload:
            assert model.config._attn_implementation == implementation

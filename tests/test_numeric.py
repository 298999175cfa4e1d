"""exactness="numeric": the C kernels compute what the bitwise mode computes, up to the order of sums."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.compute.cpu_compute import CpuCompute
from offmoe.compute.cpu_slot import CpuSlot
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.cpu import CpuKernels, GatedExpert, Glu, PreparedExpert, Rows
from offmoe.compute.kernels.library import KernelStatus, status
from offmoe.compute.torch_compute import TorchCompute
from offmoe.config import OffloadConfig
from offmoe.device.arena import SlotArena
from offmoe.device.backend import CpuBackend
from offmoe.errors import CheckpointError, ConfigError, OffmoeError
from offmoe.hf.catalog import catalog
from offmoe.hf.catalog.build import build_catalog
from offmoe.pack.pack import pack, weight_format
from offmoe.quant.packed_weight import PackedWeight
from offmoe.simulate.replay import replay
from offmoe.storage.layout import Assembly, ExpertLayout
from offmoe.trace.trace import read_trace
from tests import quantized, tiny
from tests.doubles import DeferredBackend

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
PROMPT = {"input_ids": tiny.prompt()}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
SAME = 2e-5
"""Relative L2 of logits computed in float32; in bf16 a tiny model's own rounding is 1e-2."""
BLOCK = 32
"""Columns per scale in the quantized checkpoints: the smallest group that kernels have."""


@pytest.fixture(autouse=True)
def kernels() -> None:
    if status().library is None:
        pytest.skip(status().message)


@pytest.fixture
def groups_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "BLOCK", BLOCK)
    for kind in ("awq", "gptq", "gptq-int8-desc-act"):
        monkeypatch.setitem(quantized.FORMATS[kind][1], "group_size", BLOCK)
    monkeypatch.setitem(quantized.FORMATS["fp8"][1], "weight_block_size", [BLOCK, BLOCK])
    for kind in ("ct-int4", "ct-int4-asym", "ct-int8"):
        weights = quantized.FORMATS[kind][1]["config_groups"]["group_0"]["weights"]
        monkeypatch.setitem(weights, "group_size", BLOCK)


def run(
    folder: Path, slots: int = 3, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt and tokens after it; every recording replays to the statistics of the run."""
    trace = folder.parent / "run.npz"
    if "experts" not in options:
        options.setdefault("exactness", "bitwise")
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=slots, dtype=dtype, trace=trace, **options)
    with model.offload, torch.no_grad():
        logits = model(**PROMPT).logits.float()
        tokens = model.generate(**PROMPT, **GREEDY)
        stats = model.offload.stats()
    recorded = read_trace(trace)
    assert recorded.options is not None
    assert replay(recorded, recorded.options).stats == stats
    return logits, tokens


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return ((got - right).norm() / right.norm()).item()


def without_kernels(folder: Path, **options: Any) -> list[str | None]:
    """Per MoE layer, the reason why kernels do not compute it."""
    config = OffloadConfig(device="cpu", slots_per_layer=3, exactness="numeric", **options)
    return [layer.without_kernel for layer in inspect(folder, config, dtype=torch.float32).catalog.layers]


def dense(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    own: dict[str, Any] = {"moe_intermediate_size": 64} if "moe_intermediate_size" in tiny.CONFIGS[family] else {}
    return tiny.save(tiny.build(family, dtype, **{**SIZES, **own, **overrides}), folder / "dense")


FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_experts(tmp_path: Path, family: str) -> None:
    """Two slots of eight experts: prompts run in waves. gpt-oss has biases, and gate and up interleaved."""
    folder = dense(tmp_path, family)
    assert set(without_kernels(folder)) == {None}
    right, tokens = run(folder, slots=8)
    got, same_tokens = run(folder, slots=2, exactness="numeric")
    assert error(got, right) < SAME
    assert torch.equal(same_tokens, tokens)


@pytest.mark.parametrize("fused", [False, True])
def test_fused_experts_of_transformers_own_format(tmp_path: Path, fused: bool) -> None:
    model = tiny.build("mixtral", torch.bfloat16, **SIZES)
    folder = tiny.save(model, tmp_path / "dense", original_format=not fused)
    assert set(without_kernels(folder)) == {None}
    assert error(run(folder, exactness="numeric")[0], run(folder)[0]) < SAME


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("ct-int4", "mixtral"),
        ("ct-int4", "qwen3_moe"),
        ("ct-int4-asym", "mixtral"),
        ("ct-int8", "mixtral"),
        ("awq", "mixtral"),
        ("gptq", "mixtral"),
        ("mxfp4", "gpt_oss"),
        ("fp8", "mixtral"),
        ("fp8-rows", "mixtral"),
    ],
)
@pytest.mark.usefixtures("groups_of_32")
def test_published_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, family: str) -> None:
    own: dict[str, Any] = {"moe_intermediate_size": 64} if "moe_intermediate_size" in tiny.CONFIGS[family] else {}
    folder, _ = quantized.save(tmp_path, family, kind, **SIZES, **own)
    assert set(without_kernels(folder)) == {None}
    right, tokens = run(folder)
    computed: set[str] = set()

    def prepared(weights: GatedExpert, glu: Glu) -> PreparedExpert:
        for weight in (weights.gate, weights.up, weights.down):
            assert isinstance(weight, PackedWeight)
            computed.add(weight.format.kind)
        return PreparedExpert(weights, glu)

    monkeypatch.setattr("offmoe.compute.cpu_compute.PreparedExpert", prepared)
    got, same_tokens = run(folder, exactness="numeric")
    own_names = {"ct-int8": "int8", "mxfp4": "mxfp4", "fp8": "fp8", "fp8-rows": "fp8"}
    assert computed == {own_names.get(kind, "int4")}
    allowed = SAME if kind.startswith("fp8") else 5e-3
    assert error(got, right) < allowed  # decoded weights are rounded to the dtype of the scales, kernels' are not
    assert torch.equal(same_tokens, tokens)


PACKED = [("int4", 64, False), ("int4", 32, True), ("int8", None, False)]


@pytest.mark.parametrize(("experts", "group", "zeros"), PACKED)
def test_what_offmoe_pack_wrote(tmp_path: Path, experts: str, group: int | None, zeros: bool) -> None:
    folder = tmp_path / "packed"
    pack(dense(tmp_path, "mixtral", torch.float32), folder, weight_format(experts, group, zeros))
    right, tokens = run(folder)
    numeric, same_tokens = run(folder, slots=2, exactness="numeric")
    assert error(numeric, right) < SAME  # scales are float32 here, so decoding rounds nothing
    assert torch.equal(same_tokens, tokens)
    asked, _ = run(folder, experts=experts)
    assert torch.equal(asked, numeric)
    rounded, _ = run(folder, experts=experts, activations="int8")
    assert 1e-4 < error(rounded, numeric) < 0.05


def test_rounded_inputs_need_no_word_where_results_are_numeric_by_themselves(tmp_path: Path) -> None:
    whole = dense(tmp_path, "mixtral")
    pack(whole, tmp_path / "packed", weight_format("int4", 64))
    config = OffloadConfig(device="cpu", slots_per_layer=3, activations="int8")
    assert inspect(tmp_path / "packed", config).config.is_numeric
    with pytest.raises(ConfigError, match="rounds the inputs of experts, which is not bitwise"):
        inspect(whole, config)


def test_one_slot_holds_as_much_as_the_packed_record(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pack(dense(tmp_path, "mixtral", hidden_size=128, intermediate_size=256), folder, weight_format("int4", 64))
    weights = 3 * 128 * 256
    either: tuple[dict[str, Any], ...] = ({"exactness": "bitwise"}, {"exactness": "numeric"})
    for options in either:
        found = inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3, **options))
        assert found.plan.slots == 2 * 3 * weights * (4 + 16 / 64) / 8
    decoded = inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3, exactness="bitwise")).plan.workspace
    assert found.plan.workspace < decoded


@pytest.mark.parametrize(
    ("overrides", "dtype", "why"),
    [
        ({"hidden_size": 56, "num_attention_heads": 2}, torch.bfloat16, "no multiples"),
        ({}, torch.float16, "no float16"),
        ({"hidden_act": "relu"}, torch.bfloat16, "the activation"),
    ],
)
def test_what_no_kernel_has_is_computed_as_ever(
    tmp_path: Path, overrides: dict[str, Any], dtype: torch.dtype, why: str
) -> None:
    folder = dense(tmp_path, "mixtral", dtype, **overrides)
    assert all(why in str(reason) for reason in without_kernels(folder))
    got, right = run(folder, exactness="numeric"), run(folder)
    assert torch.equal(got[0], right[0])
    assert torch.equal(got[1], right[1])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gptq-int8-desc-act", "no gptq int8"),
        ("nf4", "no bitsandbytes nf4"),
    ],
)
@pytest.mark.usefixtures("groups_of_32")
def test_formats_without_kernels(tmp_path: Path, kind: str, why: str) -> None:
    folder, _ = quantized.save(tmp_path, "mixtral", kind, **SIZES)
    assert all(why in str(reason) for reason in without_kernels(folder))
    assert torch.equal(run(folder, exactness="numeric")[0], run(folder)[0])


@pytest.mark.parametrize(
    ("kind", "why"),
    [("fp8", "no fp8 in blocks of 8 columns"), ("ct-int8", "no compressed-tensors int8 in groups of 8")],
)
def test_small_blocks_are_computed_as_ever(tmp_path: Path, kind: str, why: str) -> None:
    folder, _ = quantized.save(tmp_path, "mixtral", kind, **SIZES)
    assert all(why in str(reason) for reason in without_kernels(folder))
    assert torch.equal(run(folder, exactness="numeric")[0], run(folder)[0])


def test_without_the_library_torch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packed"
    pack(dense(tmp_path, "mixtral"), folder, weight_format("int4"))
    monkeypatch.setattr(catalog, "status", lambda: KernelStatus(None, "not built"))
    got, right = run(folder, experts="int4"), run(folder)
    assert torch.equal(got[0], right[0])


@pytest.mark.usefixtures("groups_of_32")
def test_an_index_that_the_config_denies_is_found_out(tmp_path: Path) -> None:
    folder, _ = quantized.save(tmp_path, "mixtral", "gptq", **SIZES)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.g_idx"
    tiny.edit(folder, {name.format(e): torch.arange(64, dtype=torch.int32).flip(0) // BLOCK for e in range(8)})
    with pytest.raises(CheckpointError, match=r"not in the order of their groups.*exactness='bitwise'"):
        run(folder, exactness="numeric")
    run(folder)


def test_a_pool_of_slots_for_all_layers(tmp_path: Path) -> None:
    """Experts of several layers take turns in one slot, and prefetches fill slots in advance."""
    folder = dense(tmp_path, "mixtral", num_hidden_layers=3)
    right, _ = run(folder, slots=8)
    assert error(run(folder, slots=2, scope="model", exactness="numeric", prefetch=2)[0], right) < SAME


def test_every_wait_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the strict double, where a missing wait gives NaN."""
    folder = tmp_path / "packed"
    pack(dense(tmp_path, "mixtral"), folder, weight_format("int4"))
    right, _ = run(folder, experts="int4")
    backend = DeferredBackend()
    monkeypatch.setattr("offmoe.budget.inspect.select_backend", lambda device: backend)
    # The C kernels are for devices whose memory is the host's, which the double is not.
    monkeypatch.setattr(
        "offmoe.budget.inspect.build_catalog",
        lambda checkpoint, meta: build_catalog(checkpoint, meta).for_kernels(meta),
    )
    for slots, prefetch in ((2, 0), (3, 2)):
        assert torch.equal(run(folder, slots=slots, prefetch=prefetch, experts="int4")[0], right)


def test_close_leaves_no_threads(tmp_path: Path) -> None:
    folder = dense(tmp_path, "mixtral")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).sum()  # starts torch's own second thread, which stays
        before = len(psutil.Process().threads())
        model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, exactness="numeric")
    finally:
        torch.set_num_threads(threads)
    model.generate(**PROMPT, **GREEDY)
    config = model.offload.config
    assert (config.exactness, config.experts, config.activations) == ("numeric", "native", "float")
    model.offload.close()
    model.offload.close()
    deadline = time.monotonic() + 20  # a thread that was joined is listed a moment longer
    while len(psutil.Process().threads()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(OffmoeError, match="was closed"):
        model.generate(**PROMPT, **GREEDY)


def test_closing_waits_for_the_call_under_way() -> None:
    layout = ExpertLayout.of({"gate": (torch.bfloat16, (16, 32))})
    arena = SlotArena(CpuBackend().allocate, [layout])
    inside, go_on = threading.Event(), threading.Event()

    class Kernels(CpuKernels):
        closed = False

        def __init__(self) -> None:
            """No threads."""

        def rows_of(self, expert: PreparedExpert) -> Rows:
            def rows(x: torch.Tensor) -> torch.Tensor:
                inside.set()
                assert go_on.wait(30)
                assert not self.closed
                return x

            return rows

        def close(self) -> None:
            self.closed = True

    class Slot(CpuSlot):
        def expert(self, views: object) -> GatedExpert:
            return GatedExpert(*[torch.zeros(32, 32, dtype=torch.bfloat16)] * 3)

    slot = Slot(layout, Assembly(), (), Glu(), False)
    kernels = Kernels()
    compute = CpuCompute(kernels, arena, TorchCompute(arena, torch.float32))
    layer = ExpertLayer(0, layout, slot.assembly, lambda weights, x: x, cpu_slot=slot)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(compute.expert, layer, 0, torch.ones(1, 1))
        assert inside.wait(30)
        closing = pool.submit(compute.close)
        assert not kernels.closed
        go_on.set()
        assert call.result(30).item() == 1
        closing.result(30)
    assert kernels.closed
    with pytest.raises(OffmoeError, match="was closed"):
        compute.expert(layer, 0, torch.ones(1, 1))

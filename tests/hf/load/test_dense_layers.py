"""Offloaded dense layers give the same bits as resident ones, and leave nothing behind."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offmoe
from offmoe.api import load
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, ConfigError, OffmoeError, ShardChangedError
from offmoe.hf.load.dense_layers import dense_layers
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from offmoe.types import DISK, HOST
from tests import tiny


def smallest(folder: str | Path, **options: Any) -> int:
    return inspect(folder, OffloadConfig(device="cpu", **options)).plan.smallest


def generate(model: tiny.Model) -> torch.Tensor:
    return model.generate(input_ids=tiny.prompt(), max_new_tokens=8, do_sample=False)


def equal_to_resident(folder: Path, model: tiny.Model) -> None:
    resident = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    assert resident.offload.memory().offloaded_layers == 0
    with resident.offload, model.offload, torch.no_grad():
        assert torch.equal(model(input_ids=tiny.prompt()).logits, resident(input_ids=tiny.prompt()).logits)
        assert torch.equal(generate(model), generate(resident))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_same_bits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = tiny.save(tiny.build(family, dtype), tmp_path)
    model = offmoe.from_pretrained(folder, device="cpu", device_memory=smallest(folder))
    plan = model.offload.memory()
    assert plan.offloaded_layers == 3
    assert plan.offloaded_in == DISK
    assert plan.used <= plan.budget
    total = inspect(folder, OffloadConfig(device="cpu")).plan.dense
    there = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    resident = sum(t.nbytes for t in there.values())
    assert plan.dense == resident if dtype == torch.float32 else resident <= plan.dense < resident + 1000
    assert plan.dense + plan.offloaded == total
    assert plan.offloaded > 0
    assert any(p.is_meta for p in model.parameters())
    equal_to_resident(folder, model)


def test_the_demo_in_the_smallest_memory() -> None:
    ids = torch.arange(5, 25)[None]
    tokens = []
    for budget in (smallest("demo"), "auto"):
        model = offmoe.from_pretrained("demo", device="cpu", device_memory=budget)
        with model.offload as runtime:
            tokens.append(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False))
            assert (runtime.memory().offloaded_layers > 0) == (budget != "auto")
    assert torch.equal(*tokens)


def test_as_many_layers_as_fit_stay(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral", num_hidden_layers=6), tmp_path)
    plan = inspect(folder, OffloadConfig(device="cpu")).plan
    seen = set()
    for budget in range(plan.smallest, plan.smallest_dense + 1, (plan.smallest_dense - plan.smallest) // 7):
        model = offmoe.from_pretrained(folder, device="cpu", device_memory=budget)
        with model.offload as runtime:
            found = runtime.memory()
            away = [any(p.is_meta for p in layer.parameters()) for layer in model.model.layers]
            assert away == [False] * (6 - found.offloaded_layers) + [True] * found.offloaded_layers, "the last ones go"
            assert found.used <= budget
            generate(model)
            seen.add(found.offloaded_layers)
    assert len(seen) > 2


def test_the_smallest_budget_is_honest(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("deepseek_v3"), tmp_path)
    for options in ({}, {"slots_per_layer": 4}, {"max_context": 300}, {"scope": "model"}):
        wanted: dict[str, Any] = {**options, "device_memory": 1000}
        with pytest.raises(CapacityError) as refused:
            offmoe.from_pretrained(folder, device="cpu", **wanted)
        needs = int(re.findall(r"(?:needs|this model is) (\d+) bytes", str(refused.value))[0])
        model = offmoe.from_pretrained(folder, device="cpu", **{**wanted, "device_memory": needs})
        with model.offload as runtime:
            generate(model)
            assert runtime.memory().used <= needs
        with pytest.raises(CapacityError, match=rf"(needs|this model is) {needs} bytes"):
            offmoe.from_pretrained(folder, device="cpu", **{**wanted, "device_memory": needs - 1})


def test_from_host_memory(tmp_path: Path) -> None:
    """Host memory as the place, as beside a device with memory of its own; here both are RAM."""
    folder = tiny.save(tiny.build("qwen3_moe"), tmp_path)
    found = inspect(folder, OffloadConfig(device="cpu", device_memory=smallest(folder)))
    object.__setattr__(found.plan, "offloaded_in", HOST)
    model = load(found)
    (folder / "model.safetensors.index.json").unlink()  # nothing is read from here any more but experts
    assert sum(p.is_meta for p in model.parameters()) > 10
    tokens = generate(model)
    model.offload.close()
    tiny.save(tiny.build("qwen3_moe"), folder)
    model = offmoe.from_pretrained(folder, device="cpu")
    with model.offload:
        assert torch.equal(tokens, generate(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_cast_like_stock_casts_them(tmp_path: Path, dtype: str) -> None:
    stored = torch.bfloat16 if dtype == "float32" else torch.float32
    folder = tiny.save(tiny.build("mixtral", stored), tmp_path)
    budget = inspect(folder, OffloadConfig(device="cpu"), dtype=dtype).plan.smallest
    logits = []
    for memory in (budget, "auto"):
        model = offmoe.from_pretrained(folder, device="cpu", device_memory=memory, dtype=dtype)
        with model.offload, torch.no_grad():
            logits.append(model(input_ids=tiny.prompt()).logits)
    assert logits[0].dtype == getattr(torch, dtype)
    assert torch.equal(*logits)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, temporary = tmp_path / "model", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    tiny.save(tiny.build("mixtral"), folder)
    model = offmoe.from_pretrained(folder, device="cpu", device_memory=smallest(folder))
    assert [list(found.iterdir()) for found in temporary.iterdir()] == [[]], "nothing had to be written once more"
    generate(model)
    reference = weakref.ref(model)
    model.offload.close()
    model.offload.close()
    assert list(temporary.iterdir()) == []
    del model
    gc.collect()
    assert reference() is None

    forgotten = offmoe.from_pretrained(folder, device="cpu", device_memory=smallest(folder))
    del forgotten
    gc.collect()
    assert list(temporary.iterdir()) == [], "a model that nobody closed"

    tiny.edit(folder, {"model.layers.0.input_layernorm.weight": None})
    with pytest.raises(OffmoeError):
        offmoe.from_pretrained(folder, device="cpu", device_memory=smallest(folder))
    assert list(temporary.iterdir()) == [], "a load that failed"


def test_the_handle_refuses_what_it_refuses_otherwise(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    model: tiny.Model = offmoe.from_pretrained(folder, device="cpu", device_memory=smallest(folder))
    with model.offload:
        with pytest.raises(ConfigError, match="stays on cpu"):
            model.to(torch.float16)
        with pytest.raises(ConfigError, match="device_map"):
            offmoe.from_pretrained(folder, device="cpu", device_map="auto")
        assert model.device == torch.device("cpu")
        generate(model)
        model.save_pretrained(tmp_path / "copy")
        with torch.no_grad():
            model.model.layers[2].self_attn.q_proj.weight.add_(1)
        with pytest.raises(ConfigError, match="was changed since loading"):
            model.save_pretrained(tmp_path / "other")
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_a_shard_replaced_under_a_running_model_is_noticed(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path)
    model = offmoe.from_pretrained(folder, device="cpu", device_memory=smallest(folder))
    with model.offload:
        for file in folder.glob("*.safetensors"):
            with open(file, "r+b") as shard:
                shard.truncate(8)
        with pytest.raises(ShardChangedError):
            generate(model)
        assert all(p.is_meta for n, p in model.named_parameters() if n.endswith("q_proj.weight")), "it left"


def test_a_forward_that_fails_gives_the_memory_back(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path)
    model = offmoe.from_pretrained(folder, device="cpu", device_memory=smallest(folder))
    for error in (ValueError, KeyboardInterrupt):

        def fail(*_: object, error: type[BaseException] = error) -> None:
            raise error

        handle = model.model.layers[1].self_attn.register_forward_pre_hook(fail)
        with pytest.raises(error):
            generate(model)
        handle.remove()
        generate(model)
    equal_to_resident(folder, model)


def test_two_threads_do_not_share_the_memory(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path)
    model = offmoe.from_pretrained(folder, device="cpu", device_memory=smallest(folder))
    entered, leave = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        entered.set()
        assert leave.wait(20)

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(hold)
    thread = threading.Thread(target=lambda: model.model(tiny.prompt()))
    thread.start()
    assert entered.wait(20)
    handle.remove()
    with pytest.raises(OffmoeError, match="another thread"):
        model.model(tiny.prompt())
    leave.set()
    thread.join()
    equal_to_resident(folder, model)


def test_predictions_work_and_replay_agrees(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    path = tmp_path / "trace.npz"
    budget = smallest(folder)
    model = offmoe.from_pretrained(folder, device="cpu", device_memory=budget, prefetch=2, trace=path)
    with model.offload:
        generate(model)
        stats = model.offload.stats()
    assert stats.prefetched > 0
    trace = read_trace(path)
    assert trace.options is not None
    assert trace.predicted is not None
    assert (trace.predicted[-1, 1:] >= 0).all(), "a layer is not predicted: routers stay on the device"
    assert replay(trace, trace.options).stats == stats


def test_what_moves_is_matrices_but_no_router(tmp_path: Path) -> None:
    meta = inspect(tiny.save(tiny.build("deepseek_v3"), tmp_path), OffloadConfig(device="cpu")).meta
    layers = dense_layers(meta)
    assert [layer.name for layer in layers] == [f"model.layers.{i}" for i in range(3)]
    names = {name.partition("layers.1.")[2] for name in layers[1].shapes}
    assert "mlp.shared_experts.up_proj.weight" in names
    assert "self_attn.o_proj.weight" in names
    assert not any("norm" in name or "gate.weight" in name or ".experts." in name for name in names)


def test_a_shared_weight_stays(tmp_path: Path) -> None:
    meta: tiny.Model = inspect(tiny.save(tiny.build("mixtral"), tmp_path), OffloadConfig(device="cpu")).meta
    layers = meta.model.layers
    assert isinstance(layers, nn.ModuleList)
    one: Any = layers[1]
    other: Any = layers[2]
    other.self_attn.o_proj.weight = one.self_attn.o_proj.weight
    moving = {name for layer in dense_layers(meta) for name in layer.shapes}
    assert "model.layers.0.self_attn.o_proj.weight" in moving
    assert not moving & {f"model.layers.{i}.self_attn.o_proj.weight" for i in (1, 2)}

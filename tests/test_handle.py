"""The handle of a loaded model: one user at a time, limits held, failures survived, nothing left behind."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import offmoe
from offmoe.api import load
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, ConfigError, OffmoeError, ShardChangedError
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from offmoe.types import ExpertKey, Fetch
from tests import tiny
from tests.doubles import DeferredBackend
from tests.policy.invariants import check_planner


@pytest.fixture
def folder(tmp_path):
    return tiny.save(tiny.build("mixtral"), tmp_path / "model")


@pytest.fixture
def model(folder):
    loaded = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    yield loaded
    loaded.offload.close()


def test_a_generate_of_the_callers_own_gets_what_the_caller_gives(folder, model, tmp_path):
    """A function of its own, or the code of a folder: as in stock, with no argument that offmoe adds."""
    (tmp_path / "own" / "custom_generate").mkdir(parents=True)
    code = (
        "def generate(model, input_ids, max_new_tokens, **others):\n"
        "    assert 'disable_compile' not in others\n"
        "    return model.generate(input_ids, max_new_tokens=2)\n"
    )
    (tmp_path / "own" / "custom_generate" / "generate.py").write_text(code)
    stock = tiny.comparable(AutoModelForCausalLM.from_pretrained(folder))
    given = {"input_ids": tiny.prompt(), "max_new_tokens": 8}
    own = {"custom_generate": str(tmp_path / "own"), "trust_remote_code": True}
    assert torch.equal(model.generate(**given, **own), stock.generate(**given, **own))

    def first(model, input_ids, **_: object):
        return model(input_ids).logits.argmax(-1)

    assert torch.equal(*(each.generate(**given, custom_generate=first) for each in (model, stock)))


def generate(model, **options):
    return model.generate(input_ids=tiny.prompt(), max_new_tokens=8, do_sample=False, **options)


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("offmoe-reader")]


def test_experts_are_nowhere_in_the_model(model):
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert not any("experts" in name for name in names)
    plan = model.offload.memory()
    assert plan.slots == 3 * 3 * model.offload._executor._transfer.writer.arena.nbytes // len(
        model.offload._executor._transfer.writer.arena
    )
    assert not any(p.requires_grad for p in model.parameters())


def test_every_auto_is_resolved(model):
    config = model.offload.config
    assert config.slots_per_layer == 3
    assert "auto" not in (config.device, config.device_memory, config.exactness)
    assert config.max_context == model.offload.memory().max_context


def test_stats_subtract_and_reset(model):
    generate(model)
    first = model.offload.stats()
    generate(model)
    second = model.offload.stats() - first
    assert second.demands > 0
    assert sum(layer.demands for layer in second.by_layer) == second.demands
    model.offload.reset_stats()
    assert model.offload.stats().demands == 0


def test_a_second_generation_at_the_same_time_is_refused(model):
    entered, leave, errors = threading.Event(), threading.Event(), []

    class Hold:
        def put(self, value):
            entered.set()
            assert leave.wait(20)

        def end(self):
            pass

    thread = threading.Thread(target=lambda: model.generate(tiny.prompt(1), max_new_tokens=2, streamer=Hold()))
    thread.start()
    assert entered.wait(20)
    for call in (lambda: generate(model), lambda: model(tiny.prompt())):
        try:
            call()
        except OffmoeError as error:
            errors.append(str(error))
    leave.set()
    thread.join()
    assert len(errors) == 2
    assert "already generating" in errors[0]
    generate(model)


def test_parts_of_a_model_are_one_users_too(model):
    """A call of `model.model` goes past the lock around the model's own forward."""
    experts, entered, leave, errors = model.offload._executor, threading.Event(), threading.Event(), []

    class Hold:
        def predict(self, layer):
            entered.set()
            assert leave.wait(20)

    want = model.model(tiny.prompt()).last_hidden_state
    experts.predictor = Hold()
    experts.planner.wants_prediction = lambda layer: True
    thread = threading.Thread(target=lambda: errors.append(model.model(tiny.prompt()).last_hidden_state))
    thread.start()
    assert entered.wait(20)
    with pytest.raises(OffmoeError, match="another thread"):
        model.model(tiny.prompt())
    leave.set()
    thread.join()
    assert torch.equal(errors[0], want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12: forking with threads is the point
def test_a_fork_is_refused_and_leaves_the_parent_alone(folder, tmp_path):
    """Its readers are gone: it would wait for ever."""
    path = tmp_path / "t.npz"
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=2, trace=path)
    generate(model)
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (lambda: generate(model), lambda: model.model(tiny.prompt())):
            try:
                call()
            except OffmoeError:
                refused += 1
        model.offload.close()
        os._exit(refused if not path.exists() else 9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    generate(model)
    model.offload.close()
    trace = read_trace(path)
    assert replay(trace, trace.options).stats == model.offload.stats()


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(model, copier):
    with pytest.raises(ConfigError, match="cannot be copied or pickled"):
        copier(model)


def test_another_experts_implementation_is_refused(model):
    with pytest.raises(ConfigError, match="no other experts implementation"):
        model.set_experts_implementation("eager")
    generate(model)


def test_a_recording_survives_calls_of_parts(folder, tmp_path):
    path = tmp_path / "t.npz"
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, trace=path)
    with model.offload:
        model.model(tiny.prompt(1))
        model.model(tiny.prompt(1, seed=4))
        generate(model)
        stats = model.offload.stats()
    trace = read_trace(path)
    assert replay(trace, trace.options).stats == stats


def test_moves_are_refused_and_moves_to_where_it_is_are_not(model):
    assert model.to("cpu") is model
    assert model.float() is model
    for move in (model.half, lambda: model.to("meta"), lambda: model.to(torch.bfloat16)):
        with pytest.raises(ConfigError, match="stays on cpu"):
            move()


def test_gradients_are_refused(model):
    embeddings = torch.zeros(1, 3, 32, requires_grad=True)
    with pytest.raises(ConfigError, match="gradients"):
        model(inputs_embeds=embeddings)


def test_going_past_the_reserved_context_is_refused(folder):
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, max_context=20)
    with model.offload:
        model.generate(tiny.prompt(1, 10), max_new_tokens=10, do_sample=False)
        with pytest.raises(CapacityError, match="max_context=21"):
            model(tiny.prompt(1, 21))
        with pytest.raises(CapacityError, match="20 that memory is reserved for"):
            model.generate(tiny.prompt(1, 10), max_new_tokens=30, do_sample=False)
        generate_again = model.generate(tiny.prompt(1, 10), max_new_tokens=4, do_sample=False)
    assert generate_again.shape == (1, 14)


def test_the_class_is_the_architectures_own(model):
    assert type(model) is MixtralForCausalLM
    other = MixtralForCausalLM(model.config)
    assert not {"generate", "forward", "_apply", "save_pretrained"} & vars(other).keys(), "only the instance is changed"


def test_closing_ends_threads_and_refuses_more(model):
    assert readers()
    model.offload.close()
    model.offload.close()
    assert not readers()
    with pytest.raises(OffmoeError, match="closed"):
        generate(model)


def test_a_forgotten_model_leaves_no_thread(folder):
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    generate(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not readers()


def test_two_models_do_not_share(folder):
    one = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=2)
    two = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=5)
    with one.offload, two.offload:
        assert torch.equal(generate(one), generate(two))
        assert one.offload.stats().misses > two.offload.stats().misses


def test_a_closed_model_gives_its_slots_back(folder):
    """At once, not when the garbage collector comes by: what it leaves behind are circles."""
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    generate(model)
    slots = StorageWeakRef(model.offload._executor._transfer.writer.arena.memory.untyped_storage())
    assert not slots.expired()
    model.offload.close()
    assert slots.expired()


def test_after_a_failure_the_next_generation_is_right(folder, monkeypatch):
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    with model.offload:
        want = generate(stock)
        store, calls = model.offload._executor._transfer.writer.store, []
        original = store.read_part

        def fails_once(key, part, buffer, *how):
            calls.append(key)
            if len(calls) == 5:
                raise offmoe.TransferError("injected")
            original(key, part, buffer, *how)

        monkeypatch.setattr(store, "read_part", fails_once)
        with pytest.raises(offmoe.TransferError, match="injected"):
            generate(model)
        assert torch.equal(generate(model), want)
        check_planner(model.offload._executor.planner)


def test_an_interrupted_recording_is_still_a_trace(folder, tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, trace=path)
    with model.offload:
        generate(model)
        before = model.offload.stats()
        monkeypatch.setattr(
            model.offload._executor._transfer, "ready", lambda slot: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            generate(model)
        after = model.offload.stats()
    trace = read_trace(path)
    assert replay(trace, trace.options).stats == after
    assert after.demands > before.demands


def test_a_shard_replaced_while_in_use_is_noticed(folder):
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=2, prefetch=0)
    with model.offload:
        generate(model)
        store = model.offload._executor._transfer.writer.store
        store._clock = lambda: 1e9  # the next look at the shards is due
        for shard in sorted(folder.glob("*.safetensors")):
            other = shard.with_suffix(".new")
            other.write_bytes(shard.read_bytes())
            os.replace(other, shard)
        with pytest.raises(ShardChangedError, match="safetensors"):
            generate(model)


def test_a_model_on_the_deferred_device_computes_the_same(folder, monkeypatch):
    """The whole way with the strict double: a wait missing anywhere would be NaN."""
    want = generate(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
    backend = DeferredBackend()
    monkeypatch.setattr("offmoe.budget.inspect.select_backend", lambda device: backend)
    runs: list[tuple[Any, Any, Any]] = [(2, 0, 0), (3, 2, 0), (3, "auto", "auto"), (8, 0, 0), (1, 2, 0)]
    runs += [((1, 1, 0), 0, 0), ((1, 1, 0), 2, "auto")]  # one pool of two slots
    for slots, prefetch, host_memory in runs:
        model = offmoe.from_pretrained(folder, slots_per_layer=slots, prefetch=prefetch, host_memory=host_memory)
        with model.offload:
            backend.guard(model.offload._executor._transfer.writer)
            assert torch.equal(generate(model), want)


def test_a_budget_below_the_smallest_is_named(folder):
    with pytest.raises(CapacityError, match="smallest device_memory that works for this model is"):
        offmoe.from_pretrained(folder, device="cpu", device_memory="1KiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_layer": (2, 0, 2), "scope": "layer"}, "slots_per_layer=0 for MoE layer 1"),
        ({"slots_per_layer": (0, 0, 1)}, "1 slots in all"),
        ({"slots_per_layer": (3, 3)}, "2 values, but the model has 3 MoE layers"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"dtype": "float7"}, "dtype='float7'"),
        ({"dtype": "int8"}, "dtype='int8' is not one to compute in"),
        ({"trace": "/dev/null"}, "is a device; give the name of a file"),
        ({"trace": "/"}, "is a folder; give"),
        ({"trace": "x" * 300}, "cannot be written"),
        ({"profile": "/no/such/p.json"}, "cannot be read"),
        ({"device_map": "auto"}, "device_map"),
        ({"trace": "/no/such/folder/t.npz"}, "folder"),
    ],
)
def test_refused_options(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        offmoe.from_pretrained(folder, **{"device": "cpu", **options})
    assert not readers()


def test_interrupted_twice_it_is_right_afterwards(folder, monkeypatch):
    """Ctrl-C during a layer, and again while the runtime forgets."""
    want = generate(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    with model.offload:
        engine = model.offload._executor._transfer

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine, "ready", interrupted)
            patch.setattr(engine, "forget", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generate(model)
        assert torch.equal(generate(model), want)


def test_a_model_collected_by_a_reader_closes_without_waiting_for_itself(folder):
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    engine, finalizer = model.offload._executor._transfer, model.offload._finalizer
    closed = threading.Event()
    engine.writer.store.read_part = lambda *_: (finalizer(), closed.set())
    engine.fetch([Fetch(ExpertKey(0, 0), 0, None)])
    assert closed.wait(20)
    for thread in [*engine._readers, *(t for t in threading.enumerate() if t.name == "offmoe-closing")]:
        thread.join(20)
        assert not thread.is_alive()


def test_a_failed_first_forward_does_not_end_prediction(folder):
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefetch=1)
    with model.offload:
        with pytest.raises(IndexError):
            model(torch.tensor([[10_000]]))
        generate(model)
        assert model.offload.stats().prefetched > 0


def test_a_shard_replaced_between_inspecting_and_loading_is_noticed(folder):
    inspected = inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3))
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(ShardChangedError, match="while the model was loading"):
        load(inspected)
    assert not readers()


def test_a_relative_folder_survives_a_change_of_directory(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = offmoe.from_pretrained("model", device="cpu", slots_per_layer=2)
    with model.offload:
        monkeypatch.chdir("/")
        model.offload._executor._transfer.writer.store._clock = lambda: 1e9
        generate(model)

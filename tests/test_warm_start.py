"""A model that begins where an earlier run ended: same tokens, exact replays, and what a state may not do."""

from __future__ import annotations

import itertools
import json
import threading
import time

import pytest
import torch

import offmoe
import offmoe.budget.inspect
import offmoe.transfer.fill_queue as fill_queue
import offmoe.transfer.staging as staging_module
from offmoe.config import OffloadConfig
from offmoe.errors import ConfigError, OffmoeError, TransferError
from offmoe.profile import Profile
from offmoe.simulate.replay import Recording, replay
from offmoe.simulate.sweep import Settings, evaluate
from offmoe.storage import read_plan
from offmoe.trace.trace import read_trace
from offmoe.transfer.staging import staging_plan
from tests import tiny
from tests.doubles import PinningBackend

EXPERTS, LAYERS = 8, 3
PATIENCE_S = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("warm") / "model")


def load(folder, **options):
    return offmoe.from_pretrained(folder, **{"device": "cpu", "slots_per_layer": 4, **options})


def generate(model, tokens=12, seed=3):
    ids = tiny.prompt(1, 5, seed)
    return model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def filled(offload):
    deadline = time.monotonic() + PATIENCE_S
    while offload.fill_progress().running:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return offload.fill_progress()


@pytest.fixture(scope="module")
def state(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "s.json"
    model = load(folder)
    with model.offload as offload:
        generate(model)
        offload.save_state(path)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    model = load(folder, slots_per_layer=EXPERTS)
    with model.offload:
        return [generate(model, 16), generate(model, 16, 11)]


@pytest.fixture
def racing(monkeypatch):
    """The fill does not rest while the model computes."""
    monkeypatch.setattr(fill_queue, "REST", 0.0)


@pytest.fixture
def device(monkeypatch):
    """A device with memory of its own, on which copies land as late as they may."""
    backend = PinningBackend()
    monkeypatch.setattr(offmoe.budget.inspect, "select_backend", lambda name: backend)
    return backend


@pytest.mark.usefixtures("racing")
@pytest.mark.parametrize(
    ("slots", "scope", "on_miss", "prefetch", "eviction"),
    [
        (2, "layer", "fetch", 0, "aged-lfu"),
        (3, "layer", "cpu", 1, "lru"),
        (4, "model", "auto", "auto", "aged-lfu"),
        (6, "layer", "fetch", 2, "s3-fifo"),
        (6, "model", "cpu", 1, "sieve"),
        (8, "layer", "fetch", 0, "lru-2"),
    ],
)
def test_tokens_do_not_change_and_replay_follows(
    folder, state, expected, tmp_path, slots, scope, on_miss, prefetch, eviction
):
    options = {"scope": scope, "on_miss": on_miss, "prefetch": prefetch, "eviction": eviction}
    for i, known in enumerate((None, state)):
        path = tmp_path / f"{i}.npz"
        model = load(folder, slots_per_layer=slots, state=known, fill=True, trace=path, **options)
        with model.offload as offload:
            tokens = [generate(model, 16), generate(model, 16, 11)]
            stats = offload.stats()
        assert all(map(torch.equal, tokens, expected))
        trace = read_trace(path)
        assert replay(trace, trace.options).stats == stats
        assert evaluate(Recording(trace), trace.options, Settings(fills=True)).whole.stats == stats
        assert stats.filled == (0 if trace.fills is None else len(trace.fills))
        assert (trace.options.warm_counts is None) == (known is None)


@pytest.mark.usefixtures("racing")
@pytest.mark.parametrize(
    ("slots_in_ram", "scope", "pins", "in_parts"),
    [(0, "layer", 99, False), (3, "layer", 99, True), (8, "model", 7, True)],
)
def test_beside_a_device_replay_follows(
    folder, state, expected, tmp_path, device, monkeypatch, slots_in_ram, scope, pins, in_parts
):
    if in_parts:
        monkeypatch.setattr(read_plan, "part_bytes", lambda nbytes: 4096)
        monkeypatch.setattr(fill_queue, "window_bytes", lambda nbytes: 0)
    device.pins = pins
    needs = offmoe.budget.inspect.inspect(folder, OffloadConfig(slots_per_layer=3)).needs
    read = max(expert.read for expert in needs.experts)
    memory = (staging_plan(1).buffers + LAYERS * slots_in_ram) * read
    for wait in (False, True):
        model = load(
            folder,
            device=None,
            slots_per_layer=3,
            scope=scope,
            prefetch=1,
            host_memory=memory,
            state=state,
            trace=tmp_path / "run.npz",
        )
        with model.offload as offload:
            if wait:
                progress = filled(offload)
                assert progress.experts == progress.total_experts >= LAYERS * (3 + (5 if slots_in_ram == 8 else 0))
            assert all(map(torch.equal, [generate(model, 16), generate(model, 16, 11)], expected))
            stats = offload.stats()
        assert not device.pinned, "everything is unpinned, windows too"
        trace = read_trace(tmp_path / "run.npz")
        assert replay(trace, trace.options).stats == stats
        if wait:
            assert stats.filled == len(trace.fills) == LAYERS * (3 + slots_in_ram)
            assert (trace.fills.slots[:, 0] == 0).all()
            assert stats.disk_bytes == 0 or slots_in_ram < 8


def test_another_configuration_is_replayed_from_an_empty_cache(folder, state, tmp_path):
    model = load(folder, state=state, trace=tmp_path / "run.npz")
    with model.offload as offload:
        filled(offload)
        generate(model)
    trace = read_trace(tmp_path / "run.npz")
    smaller = OffloadConfig(slots_per_layer=3).cache()
    assert replay(trace, smaller).stats.filled == 0
    assert evaluate(Recording(trace), trace.options, Settings()).whole.stats.filled == 0


def test_the_popular_come_first_and_are_hit(folder, state):
    """The state's residents and counts say which four of eight experts of each layer are filled."""
    saved = json.loads(state.read_text())
    model = load(folder, state=state)
    with model.offload as offload:
        filled(offload)
        generate(model, 1)
        model.offload.save_state(state.with_name("again.json"))
        warm = offload.stats()
    popular = [sorted(range(EXPERTS), key=lambda e: -layer[e])[:3] for layer in saved["counts"]]
    assert warm.filled == 4 * LAYERS
    cold = load(folder)
    with cold.offload:
        generate(cold, 1)
        assert warm.hit_rate > cold.offload.stats().hit_rate
    again = json.loads(state.with_name("again.json").read_text())
    assert again["tokens"] > saved["tokens"], "counts go on"
    assert all(len(layer) == 4 for layer in again["residents"])
    assert sum(len({*a} & {*b}) for a, b in zip(popular, again["residents"], strict=True)) > LAYERS


def test_without_a_state_it_fills_in_file_order(folder, tmp_path):
    model = load(folder, fill=True, trace=tmp_path / "run.npz")
    with model.offload as offload:
        assert filled(offload).experts == 4 * LAYERS
        generate(model, 1)
    fills = read_trace(tmp_path / "run.npz").fills
    assert {tuple(row) for row in fills.slots[:, 1:].tolist()} == set(itertools.product(range(LAYERS), range(4)))


def test_a_popularity_orders_the_fill_too(folder, tmp_path):
    popularity = tuple(tuple(float(e) for e in range(EXPERTS)) for _ in range(LAYERS))
    model = load(folder, fill=True, eviction="static", popularity=popularity, trace=tmp_path / "run.npz")
    with model.offload as offload:
        filled(offload)
        generate(model, 1)
    fills = read_trace(tmp_path / "run.npz").fills
    assert {tuple(row) for row in fills.slots[:, 1:].tolist()} == set(itertools.product(range(LAYERS), range(4, 8)))


def test_without_state_and_fill_nothing_is_filled(folder):
    with load(folder).offload as offload:
        assert offload.fill_progress() == fill_queue.FillProgress()


def test_a_state_of_another_model_is_ignored_with_a_sentence(folder, state, tmp_path, caplog):
    other = tmp_path / "other"
    tiny.save(tiny.build("mixtral", seed=5), other)
    with load(other, state=state).offload as offload:
        assert offload.config.warm_counts is None
        assert filled(offload).experts == 4 * LAYERS, "in file order"
    (line,) = [record.message for record in caplog.records if "state" in record.message]
    assert "is of another model" in line
    assert "loaded without it" in line


def test_a_model_is_the_same_in_another_folder(folder, state, tmp_path, caplog):
    import shutil

    shutil.copytree(folder, tmp_path / "moved")
    with load(tmp_path / "moved", state=state).offload as offload:
        assert offload.config.warm_counts is not None
    assert not caplog.records


def test_a_damaged_state_never_stops_a_load(folder, tmp_path, caplog):
    (tmp_path / "s.json").write_bytes(b"\x00{not json")
    model = load(folder, state=tmp_path / "s.json")
    with model.offload as offload:
        generate(model, 2)
        offload.save_state(tmp_path / "s.json")
    assert sum("is damaged" in record.message for record in caplog.records) == 1
    with load(folder, state=tmp_path / "s.json").offload as offload:
        assert offload.config.warm_counts is not None


def test_a_state_that_does_not_exist_yet_is_no_fault(folder, tmp_path, caplog):
    with load(folder, state=tmp_path / "s.json").offload as offload:
        assert filled(offload).experts == 4 * LAYERS
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_state_profile_and_explicit_options(folder, state, tmp_path):
    """The profile's eviction stands, an explicit option wins, and the state orders the fill of both."""
    profile = Profile({"eviction": "lru", "slots_per_layer": 3, "prefetch": 0})
    model = load(folder, state=state, profile=profile, slots_per_layer=5, fill=False, trace=tmp_path / "run.npz")
    with model.offload as offload:
        assert (offload.config.eviction, offload.config.slots_per_layer) == ("lru", 5)
        assert offload.config.warm_counts is not None
        generate(model)
        assert offload.stats().filled == 0, "fill=False"
    with load(folder, profile=profile, offload_config=OffloadConfig(state=state)).offload as offload:
        assert filled(offload).experts == 4 * LAYERS
    trace = read_trace(tmp_path / "run.npz")
    assert replay(trace, trace.options).stats.filled == 0


@pytest.mark.parametrize("options", [{"state": 5}, {"fill": "yes"}, {"fill": 1}])
def test_options_that_are_none(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        OffloadConfig(**options)


def test_a_failed_step_begins_anew_and_ends_the_recording(folder, expected, tmp_path, monkeypatch):
    model = load(folder, fill=True, trace=tmp_path / "run.npz")
    with model.offload as offload:
        filled(offload)
        wave, calls = type(offload._executor._compute).wave, []

        def fails(*args):
            calls.append(args)
            if len(calls) == 7:
                raise KeyboardInterrupt
            return wave(*args)

        monkeypatch.setattr(type(offload._executor._compute), "wave", fails)
        with pytest.raises(KeyboardInterrupt):
            generate(model, 16)
        assert torch.equal(generate(model, 16), expected[0])
        assert offload.fill_progress().error is None
    trace = read_trace(tmp_path / "run.npz")
    assert trace.tokens
    replay(trace, trace.options)


def test_closing_while_it_fills(folder, state, monkeypatch):
    monkeypatch.setattr(fill_queue, "IDLE_AFTER_S", 1e9)
    monkeypatch.setattr(fill_queue, "REST", 1e9)
    before = threading.active_count()
    model = load(folder, state=state)
    generate(model, 2)
    began = time.monotonic()
    model.offload.close()
    assert time.monotonic() - began < PATIENCE_S, "the fill would rest for 30 years"
    assert threading.active_count() == before
    model.offload.close()


def test_the_memory_of_windows_is_small(folder, monkeypatch):
    """Windows exist while small experts are read, 32 MB at most, and as much as 64 experts."""
    assert staging_module.window_bytes(5 << 20) == 0
    assert staging_module.window_bytes(4 << 20) == staging_module.WINDOW_BYTES == 8 << 20
    assert staging_module.window_bytes(4096) == 16 * 4096
    with load(folder, fill=True).offload as offload:
        filled(offload)
        assert offload._executor._transfer.host.windows is None


def test_save_state_is_refused_while_another_thread_generates(folder, tmp_path):
    model = load(folder)
    with model.offload as offload:
        held, done = threading.Event(), threading.Event()

        def hold():
            with offload.in_use():
                held.set()
                done.wait(PATIENCE_S)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(PATIENCE_S)
        with pytest.raises(OffmoeError, match="already generating"):
            offload.save_state(tmp_path / "s.json")
        done.set()
        thread.join()
        offload.save_state(tmp_path / "s.json")


def test_a_read_that_fails_does_not_break_the_run(folder, tmp_path, monkeypatch, caplog):
    """The fill ends and says why; the run goes on, and raises only what it meets itself."""
    from offmoe.storage.store import ExpertStore

    read = ExpertStore.read_planned

    def fails(self, plan, *args):
        if threading.current_thread().name.startswith("offmoe-reader") and not model_runs.is_set():
            raise TransferError("the disk failed")
        return read(self, plan, *args)

    model_runs = threading.Event()
    monkeypatch.setattr(ExpertStore, "read_planned", fails)
    model = load(folder, fill=True)
    with model.offload as offload:
        progress = filled(offload)
        assert "the disk failed" in progress.error
        assert not progress.running
        model_runs.set()
        generate(model, 4)
        assert offload.stats().filled == 0
    assert caplog.text.count("the background fill ends early") == 1

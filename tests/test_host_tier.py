"""A device with memory of its own, experts in RAM beside it: same tokens, replay follows, what does not fit is said.

The device is the double on which copies land only when they are waited for; its memory is the CPU's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import offmoe
import offmoe.budget.inspect
from offmoe.errors import CapacityError, ConfigError
from offmoe.profile import CostModel, Profile
from offmoe.runtime.host_experts import HostExperts
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from offmoe.transfer.staging import staging_plan
from tests import tiny
from tests.doubles import PinningBackend

FAST_HOST = CostModel(disk_gb_s=1.0, expert_us_device=1.0, dense_us_per_token=1.0, h2d_gb_s=0.0001, expert_us_host=1.0)


@pytest.fixture
def device(monkeypatch):
    made = PinningBackend()
    monkeypatch.setattr(offmoe.budget.inspect, "select_backend", lambda name: made)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("host") / "model")


def generate(model):
    return model.generate(input_ids=tiny.prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False)


BUFFERS = staging_plan(1).buffers
"""That small experts pass through."""


def reads_of(folder):
    return max(
        e.read for e in offmoe.budget.inspect.inspect(folder, offmoe.OffloadConfig(slots_per_layer=3)).needs.experts
    )


@pytest.mark.parametrize(("slots_in_ram", "scope", "pins"), [(0, "layer", 99), (3, "layer", 99), (8, "model", 7)])
def test_tokens_are_stocks_and_replay_follows(tmp_path, folder, device, slots_in_ram, scope, pins, caplog):
    stock = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
    with torch.no_grad():
        expected = generate(stock)
    read = reads_of(folder)
    device.pins = pins
    layers = 3
    path = tmp_path / "run.npz"
    model = offmoe.from_pretrained(
        folder,
        slots_per_layer=3,
        scope=scope,
        prefetch=1,
        host_memory=(BUFFERS + layers * slots_in_ram) * read,
        trace=path,
    )
    with model.offload:
        assert torch.equal(generate(model), expected)
        stats, plan = model.offload.stats(), model.offload.memory()
        assert plan.host.slots_per_layer == (slots_in_ram,) * layers
        assert model.offload.config.host_memory == (BUFFERS + layers * slots_in_ram) * read
    assert not device.pinned, "everything is unpinned"
    trace = read_trace(path)
    assert trace.options.host_slots == plan.host.slots_per_layer
    assert replay(trace, trace.options).stats == stats
    for_nothing = (stats.prefetched - stats.prefetched_used) * trace.shape.expert_bytes[0]
    if slots_in_ram == 0:
        assert stats.disk_bytes == stats.h2d_bytes + for_nothing
    elif slots_in_ram == 8:
        assert stats.disk_bytes <= 8 * layers * trace.shape.expert_bytes[0] + for_nothing
    else:
        assert stats.disk_bytes < stats.h2d_bytes + for_nothing
    assert ("could be pinned" in caplog.text) == (pins < BUFFERS + layers * slots_in_ram)


def test_auto_takes_what_there_is_and_no_more(folder, device):
    read = reads_of(folder)
    device.ram = (BUFFERS + 7) * read
    plan = offmoe.budget.inspect.inspect(folder, offmoe.OffloadConfig(slots_per_layer=3)).plan
    assert plan.host.slots_per_layer == (3, 2, 2)
    assert plan.host.slots + plan.host.staging <= plan.host.budget == device.ram
    assert "slots of 7 experts" in plan.describe()
    whole = offmoe.budget.inspect.inspect(folder, offmoe.OffloadConfig(slots_per_layer=(8, 8, 3))).plan
    assert whole.host.slots_per_layer == (0, 0, 7), "a layer that is whole on the device needs no RAM"


def test_a_profile_may_ask_for_less(folder, device, tmp_path):
    device.ram = 100 * reads_of(folder)
    profile = tmp_path / "tuned.json"
    Profile({"slots_per_layer": 3, "host_slots": [2, 0, 9]}).write(profile)
    plan = offmoe.budget.inspect.inspect(folder, offmoe.OffloadConfig(profile=profile)).plan
    assert plan.host.slots_per_layer == (2, 0, 8)
    assert offmoe.budget.inspect.inspect(folder, offmoe.OffloadConfig(slots_per_layer=3)).plan.host.slots_per_layer == (
        8,
        8,
        8,
    )


def test_too_little_ram_is_refused_with_the_numbers(folder, device):
    with pytest.raises(
        CapacityError, match=rf"\({BUFFERS * reads_of(folder)} bytes\), the smallest host_memory that works"
    ):
        offmoe.from_pretrained(folder, slots_per_layer=3, host_memory=1000)


def test_ram_of_a_cpu_is_device_memory(folder):
    with pytest.raises(ConfigError, match="device_memory"):
        offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, host_memory="1MiB")


@pytest.mark.parametrize(
    ("on_miss", "slots_in_ram", "scope", "slots"),
    [
        ("cpu", 0, "layer", 3),
        ("auto", 3, "layer", 3),
        ("auto", 8, "model", 3),
        ("cpu", 3, "model", (1, 1, 0)),
        ("auto", 8, "model", (0, 2, 1)),
    ],
)
def test_what_the_host_computes_is_right_and_replay_follows(
    tmp_path, folder, device, on_miss, slots_in_ram, scope, slots
):
    """The device's kernels are the host's here, so even the bits must be the same."""

    def run(on_miss, **options):
        model = offmoe.from_pretrained(
            folder,
            slots_per_layer=slots,
            scope=scope,
            host_memory=(BUFFERS + 2 + 3 * slots_in_ram) * reads_of(folder),
            exactness="numeric",
            on_miss=on_miss,
            profile=Profile(costs=FAST_HOST),
            **options,
        )
        with model.offload:
            return generate(model), model(tiny.prompt()).logits, model.offload.stats(), model.offload

    path = tmp_path / "run.npz"
    tokens, logits, stats, offload = run(on_miss, prefetch=1, trace=path)
    expected, same, fetched, _ = run("fetch", prefetch=1)
    assert offload.config.on_miss == on_miss
    assert offload.config.miss_costs is not None
    assert offload.memory().host.scratch
    assert torch.equal(tokens, expected)
    assert torch.equal(logits, same)
    assert stats.host_computed > 0 == fetched.host_computed
    trace = read_trace(path)
    assert trace.options.miss_costs == offload.config.miss_costs
    assert replay(trace, trace.options).stats == stats
    assert not device.pinned


def test_bitwise_on_a_device_of_its_own_means_fetch(folder, device):
    with pytest.raises(ConfigError, match="exactness='numeric'"):
        offmoe.from_pretrained(folder, slots_per_layer=3, on_miss="cpu")
    with offmoe.from_pretrained(folder, slots_per_layer=3).offload as offload:
        assert offload.config.on_miss == "fetch"


def test_a_failure_while_the_host_computes_leaves_nothing(folder, device, monkeypatch):
    model = offmoe.from_pretrained(
        folder, slots_per_layer=3, prefetch=0, exactness="numeric", on_miss="cpu", profile=Profile(costs=FAST_HOST)
    )
    with model.offload:
        expected = generate(model)
        run, calls = HostExperts.run, []

        def fails(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return run(*args)

        monkeypatch.setattr(HostExperts, "run", fails)
        with pytest.raises(KeyboardInterrupt):
            generate(model)
        assert torch.equal(generate(model), expected)
    assert not device.pinned

"""The ways in which a model could run: which there are, what is planned for each, and how they are ranked."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from offmoe.budget.choices import QUALITY, Choice, choices, in_default_context, measured_costs, rated_costs
from offmoe.budget.inspect import Survey, inspect, survey
from offmoe.budget.predict import Rates
from offmoe.config import OffloadConfig
from offmoe.device.machines import parse_machine
from offmoe.device.planned import PlannedBackend
from offmoe.errors import CapacityError
from offmoe.pack.pack import pack, weight_format
from offmoe.profile import CostModel, Profile
from tests import native, quantized, tiny

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
RATES = Rates("a test", dense_gb_s=10.0, torch_gb_s=10.0, kernel_gb_s=10.0, disk_gb_s=2.0, operation_us=1.0)
MACHINE = parse_machine("rtx-3060-12g+ddr4-3200-64g+nvme-gen4")


def of_config(name: str, **options: object) -> tuple[Survey, OffloadConfig]:
    """A published model on a machine with 12 GB of device memory."""
    asked = OffloadConfig(**options)  # type: ignore[arg-type]
    return survey(CONFIGS / f"{name}.json", asked, dtype="bfloat16", backend=PlannedBackend(MACHINE)), asked


def names(ways: list[Choice]) -> set[str]:
    return {f"{way.experts} {way.config.exactness}" for way in ways}


def ranked(name: str, **options: object) -> list[Choice]:
    return choices(*of_config(name, **options), rated_costs(Rates.of_machine(MACHINE)))


def packable() -> tiny.Model:
    """A Mixtral in bf16 whose matrices have groups of 64 columns."""
    return tiny.build("mixtral", hidden_size=128, intermediate_size=256).to(torch.bfloat16)


def test_forms_and_contexts_of_a_dense_model() -> None:
    ways = ranked("qwen3-30b-a3b")
    assert names(ways) == {"native bitwise", "native numeric", "int8 numeric", "int4 numeric"}
    assert {way.plan.max_context for way in ways} == {4096, 32768}
    assert len(ways) == 8
    for way in ways:
        assert way.plan.used <= way.plan.budget < 12 << 30
        assert way.unchanged == (way.experts == "native" and way.config.exactness == "bitwise")
        assert way.quality in QUALITY.values()


def test_int4_takes_a_quarter_of_the_bytes() -> None:
    """0.5 bytes a weight and 2 of scale for 64 of them; the same plan that loading would make."""
    four, native = (
        next(way for way in ranked("qwen3-30b-a3b", max_context=4096) if (way.experts, way.config.exactness) == wanted)
        for wanted in (("int4", "numeric"), ("native", "bitwise"))
    )
    ratio = 2 / (0.5 + 2 / 64)
    assert four.resident / native.resident == pytest.approx(ratio, rel=0.05)


def test_speeds_are_ranked_and_what_does_not_fit_comes_last() -> None:
    for name in ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3"):
        ways = ranked(name)
        fits = [way.fits for way in ways]
        assert fits == sorted(fits, reverse=True)
        speeds = [way.tokens_per_s for way in ways if way.fits]
        assert all(b <= a * 1.051 for a, b in pairwise(speeds)), (name, speeds)
        needed = [way.plan.smallest for way in ways if not way.fits]
        assert needed == sorted(needed)
        assert all((way.predicted is None) == (not way.fits) for way in ways)


def test_a_model_that_does_not_fit_gets_the_nearest_way_that_does() -> None:
    ways = ranked("mixtral-8x7b", device_memory="9GiB")
    assert ways[0].fits
    assert ways[0].experts == "int4"


def test_what_was_asked_for_is_not_varied() -> None:
    assert names(ranked("qwen3-30b-a3b", experts="int8")) == {"int8 numeric"}
    assert names(ranked("qwen3-30b-a3b", exactness="bitwise")) == {"native bitwise"}
    assert names(ranked("qwen3-30b-a3b", exactness="numeric")) == {"native numeric", "int8 numeric", "int4 numeric"}
    assert {way.plan.max_context for way in ranked("qwen3-30b-a3b", max_context=1000)} == {1000}


def test_quantized_experts_are_not_quantized_again() -> None:
    assert names(ranked("gpt-oss-120b")) == {"native bitwise", "native numeric"}
    assert names(ranked("deepseek-v3", device_memory="11GiB")) == {"native bitwise", "native numeric"}


def test_equal_speeds_keep_the_results(tmp_path: Path) -> None:
    """Everything is resident and dispatching takes nearly all of the time, so that no form is faster."""
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    asked = OffloadConfig(device="cpu")
    ways = choices(survey(folder, asked), asked, rated_costs(RATES))
    assert ways[0].unchanged
    assert ways[0].resident == 1.0


def test_plans_are_those_of_loading(tmp_path: Path) -> None:
    folder = tiny.save(packable(), tmp_path / "model")
    asked = OffloadConfig(device="cpu", device_memory="5MiB")
    for way in choices(survey(folder, asked), asked, rated_costs(RATES)):
        assert way.fits
        loaded = inspect(folder, asked.overridden(**way.options))
        assert loaded.plan.max_context == way.plan.max_context
        assert loaded.config.exactness == way.config.exactness
        # Sizes from shapes count an expert in the worst place, sizes from headers where it stands.
        assert 0 <= sum(loaded.plan.slots_per_layer) - sum(way.plan.slots_per_layer) <= 12
        if way.experts == "native" and way.unchanged:
            assert loaded.plan == way.plan


@native.installed
def test_a_quantized_checkpoint_is_numeric_unless_it_is_asked_to_be_bitwise(tmp_path: Path) -> None:
    """`inspect` once called the way that loading takes equal to transformers, and offered none that is."""
    folder = tmp_path / "packed"
    pack(tiny.save(packable(), tmp_path / "model"), folder, weight_format("int4"))
    asked = OffloadConfig(device="cpu", max_context=512, device_memory="8MiB")
    ways = choices(survey(folder, asked), asked, rated_costs(RATES))
    assert [way.options for way in ways if not way.unchanged] == [{}]
    assert [way.options for way in ways if way.unchanged] == [{"exactness": "bitwise"}]
    for way in ways:
        assert way.plan == inspect(folder, asked.overridden(**way.options)).plan
    bitwise = asked.overridden(exactness="bitwise")
    assert names(choices(survey(folder, bitwise), bitwise, rated_costs(RATES))) == {"native bitwise"}


def test_without_options_the_best_way_that_changes_nothing_is_taken(tmp_path: Path) -> None:
    """`generate` adds no option of its own: what loading resolves is the best of the ways with the same results."""
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    asked = OffloadConfig(device="cpu", device_memory="1100KiB")
    ways = in_default_context(survey(folder, asked), asked, rated_costs(RATES))
    best = next(way for way in ways if way.unchanged)
    assert best.options == {}
    assert best.plan == inspect(folder, asked).plan


def test_experts_that_cannot_be_packed_are_not_offered(tmp_path: Path) -> None:
    """Matrices of 24 rows are no multiple of a tile."""
    folder = tiny.save(tiny.build("qwen3_moe"), tmp_path / "qwen")
    asked = OffloadConfig(device="cpu")
    found = survey(folder, asked)
    assert all(way.experts == "native" for way in choices(found, asked, None))
    alone = survey(folder / "config.json", asked)
    assert all(way.experts == "native" for way in choices(alone, asked, None))


def test_no_costs_no_speed(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    asked = OffloadConfig(device="cpu")
    ways = choices(survey(folder, asked), asked, None)
    assert all(way.fits and way.predicted is None and way.tokens_per_s == 0 for way in ways)


def test_measured_costs_price_other_forms_by_their_bytes(tmp_path: Path) -> None:
    folder = tiny.save(packable(), tmp_path / "model")
    profile = Profile(costs=CostModel(1.0, 1000.0, 10.0))
    asked = OffloadConfig(device="cpu", profile=profile)
    found = survey(folder, asked)
    ways = choices(found, asked, measured_costs(profile, found.needs, found.config.exactness))
    native, four = (next(way for way in ways if way.experts == form) for form in ("native", "int4"))
    assert native.predicted is not None
    assert native.predicted.most_tokens_per_s == pytest.approx(1e6 / (10 + 3 * 2 * 1000))
    assert four.tokens_per_s > 3 * native.tokens_per_s


def test_a_profile_of_decoded_experts_says_nothing_of_kernels(tmp_path: Path) -> None:
    folder, _ = quantized.save(tmp_path, "qwen3_moe", "ct-int4")
    profile = Profile(costs=CostModel(1.0, 1000.0, 10.0))
    asked = OffloadConfig(device="cpu", profile=profile)
    found = survey(folder, asked)
    for way in choices(found, asked, measured_costs(profile, found.needs, found.config.exactness)):
        assert (way.predicted is not None) == way.unchanged


def test_a_refusal_names_the_command_that_shows_what_fits(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "a model")
    with pytest.raises(CapacityError, match=r"What would fit: offmoe inspect '.*/a model'$"):
        inspect(folder, OffloadConfig(device="cpu", device_memory="100KiB"))


def test_a_recorded_trace_replaces_uniform_routing(tmp_path: Path) -> None:
    """Curves of hit rate over slots in all, by scope, as `tune` writes them."""
    folder = tiny.save(packable(), tmp_path / "model")
    curve = {"12": 0.75, "24": 1.0}
    costs = CostModel(0.1, 10.0, 10.0)
    profile = Profile(costs=costs, expected={"hit_rates": {"layer": curve, "model": curve}})
    asked = OffloadConfig(device="cpu", profile=profile, slots_per_layer=2, experts="native", exactness="bitwise")
    found = survey(folder, asked)
    way = choices(found, asked, measured_costs(profile, found.needs, found.config.exactness))[0]
    assert way.predicted is not None
    assert way.predicted.hit_rate == pytest.approx(0.375)  # 6 of 24 slots, half of the way to 12
    tuned = Profile({"slots_per_layer": 2}, costs, {"test_hit_rate": 0.6})
    asked = OffloadConfig(device="cpu", profile=tuned, slots_per_layer=2, exactness="bitwise")
    way = choices(found, asked, measured_costs(tuned, found.needs, found.config.exactness))[0]
    assert way.predicted is not None
    assert way.predicted.hit_rate == pytest.approx(0.6)

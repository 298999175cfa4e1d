from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offmoe.config import ON_MISS, CacheOptions
from offmoe.device.backend import CpuBackend
from offmoe.profile import CostModel, Profile
from offmoe.simulate.expect import expect
from offmoe.text import parse_size, size_option
from offmoe.types import CacheShape
from tests import families, gguf_models, native, quantized, tiny
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]

KEYS = {"family", "layers", "moe_layers", "experts", "top_k", "expert_bytes", "dense_bytes", "plan"}


def test_json(offmoe: Run, checkpoint: Path) -> None:
    found = offmoe("inspect", checkpoint, "--json", "--device", "cpu", "--device-memory", "3MiB").json
    assert found.keys() >= KEYS
    expert = 3 * 32 * 48 * 4
    assert found["family"] == "mixtral"
    assert (found["layers"], found["moe_layers"], found["experts"], found["top_k"]) == (3, 3, 8, 2)
    assert (found["expert_bytes"], found["expert_bytes_total"]) == (expert, 24 * expert)
    stock = tiny.build("mixtral", vocab_size=259)
    total = sum(p.numel() * 4 for p in [*stock.parameters(), *stock.buffers()])
    assert found["dense_bytes"] == found["plan"]["dense"] == total - 24 * expert
    assert found["plan"]["budget"] == 3 << 20
    assert found["plan"]["slots_per_layer"] == [8, 8, 8]
    assert found["predictable"] == [True] * 3
    assert found["tokens_per_s"] is None
    assert (found["plan"]["parked_layers"], found["plan"]["parked_in"]) == (0, None)


def test_layers_without_experts_do_not_count(offmoe: Run, tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("qwen3_moe"), tmp_path / "qwen")
    found = offmoe("inspect", folder, "--json", "--device", "cpu").json
    assert (found["family"], found["layers"], found["moe_layers"]) == ("qwen3_moe", 3, 2)


def test_formats_of_quantized_experts(offmoe: Run, tmp_path: Path) -> None:
    folder, _ = quantized.save(tmp_path, "qwen3_moe", "ct-int4")
    found = offmoe("inspect", folder, "--json", "--device", "cpu").json
    assert (found["quantisation"], found["expert_formats"]) == ("compressed-tensors", ["compressed-tensors int4"])
    raw = 3 * 24 * 32 * 3 // 4  # half a byte and a scale of two bytes for 8 columns
    assert (found["expert_bytes"], found["expert_bytes_total"]) == (raw, 16 * raw)
    assert found["dtype"] == "bfloat16"
    assert "(1728 bytes), compressed-tensors int4" in offmoe("inspect", folder, "--device", "cpu").out


def test_a_configuration_alone(offmoe: Run, checkpoint: Path) -> None:
    budget = ("--device", "cpu", "--device-memory", "3MiB")
    headers = offmoe("inspect", checkpoint, "--json", *budget).json
    config = offmoe("inspect", checkpoint / "config.json", "--json", *budget).json
    assert (headers["source"], config["source"]) == ("headers", "config")
    same = headers.keys() - {"source", "shards", "plan", "smallest_device_memory", "smallest_with_dense"}
    same -= {"choices", "best_command", "best_command_same_results", "predicted_from", "predicted_assuming"}
    assert {key: config[key] for key in same} == {key: headers[key] for key in same}
    assert "config.json alone: no weights here" in offmoe("inspect", checkpoint / "config.json", *budget).out
    assert "no weights here" not in offmoe("inspect", checkpoint, *budget).out


def test_table_for_people(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("inspect", checkpoint, "--device", "cpu", "--device-memory", "3MiB")
    assert (outcome.status, outcome.err) == (0, "")
    for words in ("MixtralForCausalLM", "8, top_k 2", "18432 bytes", "smallest budget", "8 per layer, 100.0 %"):
        assert words in outcome.out
    assert "needs measured costs: offmoe calibrate" in outcome.out


def test_measured_costs_let_it_tell_the_speed(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    profile = tmp_path / "p.json"
    costs = CostModel(disk_gb_s=0.018432, expert_us_device=500.0, dense_us_per_token=7000.0)  # 1 ms to read one
    Profile(costs=costs).write(profile)
    argv = ("inspect", checkpoint, "--device", "cpu", "--profile", profile)
    found = offmoe(*argv, "--slots-per-layer", "4", "--json").json
    assert found["tokens_per_s_bound"] == pytest.approx(100)
    assert found["tokens_per_s"] == found["tokens_per_s_uniform"]
    assert set(found["on_miss"]) == {"fetch", "cpu", "auto"}
    for way in found["on_miss"].values():
        assert found["tokens_per_s_bound"] >= way["roofline"] >= way["tokens_per_s"] > 0
    assert 1 / (10e-3 + 6 * 1e-3) < found["tokens_per_s"] < 1 / (10e-3 + 6 * 0.3e-3)
    assert "100.0 at most" in offmoe(*argv, "--slots-per-layer", "4").out
    Profile({"slots_per_layer": 4}, costs, {"test_hit_rate": 0.5}).write(profile)
    assert offmoe(*argv, "--json").json["tokens_per_s"] == pytest.approx(1 / (10e-3 + 6 * 0.5e-3))
    assert "at the profile's hit rate of 50.0 %" in offmoe(*argv).out
    other = offmoe(*argv, "--json", "--slots-per-layer", "5").json
    assert other["tokens_per_s"] == other["tokens_per_s_uniform"]
    everything = offmoe(*argv, "--json", "--slots-per-layer", "8").json
    assert everything["tokens_per_s_uniform"] == pytest.approx(100)


@pytest.mark.parametrize(
    "memory", [["3MiB"], ["910000", "--max-context", "128"], ["960000", "--max-context", "128"]], ids=lambda m: m[0]
)
def test_the_advice_reaches_the_knee(offmoe: Run, checkpoint: Path, memory: list[str]) -> None:
    """What the line tells to pass gives 2 x top_k slots; rounded up, it may hold an expert of 24 kB or two more."""
    outcome = offmoe("inspect", checkpoint, "--device", "cpu", "--device-memory", *memory)
    advised = re.search(r"--device-memory (\S+) --max-context (\d+)", outcome.out)
    assert advised
    again = offmoe(
        "inspect", checkpoint, "--json", "--device-memory", advised[1], "--max-context", advised[2], "--device", "cpu"
    )
    slots = again.json["plan"]["slots_per_layer"]
    assert min(slots) == 4
    assert sum(slots) <= 3 * 4 + 2


def test_the_advice_reaches_the_knee_from_where_dense_layers_are_elsewhere(offmoe: Run, checkpoint: Path) -> None:
    """They come back first when there is more memory."""
    least = offmoe("inspect", checkpoint, "--json", "--device", "cpu", "--max-context", "128").json
    memory = ("--device", "cpu", "--device-memory", least["smallest_device_memory"], "--max-context", "128")
    advised = re.search(r"--device-memory (\S+) --max-context (\d+)", offmoe("inspect", checkpoint, *memory).out)
    assert advised
    more = ("--device-memory", advised[1], "--max-context", advised[2])
    plan = offmoe("inspect", checkpoint, "--json", "--device", "cpu", *more).json["plan"]
    assert plan["parked_layers"] == 0
    assert min(plan["slots_per_layer"]) == 4


@pytest.mark.parametrize(
    ("family", "predictable", "words"),
    [
        ("mixtral", [True] * 3, "can be predicted in all layers"),
        ("zaya", [True, False, False], "can be predicted in 1 of 3 layers"),
        ("glm5_next", None, "shows when the model runs"),
    ],
)
def test_which_layers_can_be_predicted(
    offmoe: Run, tmp_path: Path, family: str, predictable: list[bool] | None, words: str
) -> None:
    folder = tiny.save(families.build(family), tmp_path / "model")
    outcome = offmoe("inspect", folder, "--json", "--device", "cpu")
    assert outcome.json["predictable"] == predictable
    assert words in " ".join(outcome.err.split()) + " ".join(outcome.out.split())


def test_the_advice_for_explicit_slots(offmoe: Run, checkpoint: Path) -> None:
    assert "use --slots-per-layer 4 " in offmoe("inspect", checkpoint, "--slots-per-layer", "3", "--device", "cpu").out


def test_facts_come_before_the_error_when_nothing_fits(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("inspect", checkpoint, "--device-memory", "100KiB", "--device", "cpu")
    assert outcome.status == 1
    assert "18432 bytes" in outcome.out
    assert "what fits" not in outcome.out
    smallest = re.search(r"smallest device_memory that works for this model is (\d+)", outcome.err)
    assert smallest
    found = offmoe("inspect", checkpoint, "--json", "--device-memory", "100KiB", "--device", "cpu")
    assert found.status == 1
    assert found.json["plan"] is None
    assert found.json["smallest_device_memory"] == int(smallest[1])
    assert offmoe("inspect", checkpoint, "--device-memory", smallest[1], "--device", "cpu").status == 0


def test_facts_come_also_where_the_machine_is_too_small(
    offmoe: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: 100_000)
    found = offmoe("inspect", checkpoint, "--json", "--device", "cpu")
    assert (found.status, found.json["plan"]) == (1, None)
    assert found.json["smallest_device_memory"] > 100_000


def test_dense_layers_that_are_elsewhere_are_said_so(offmoe: Run, checkpoint: Path) -> None:
    known = offmoe("inspect", checkpoint, "--json", "--device", "cpu").json
    budget = ("--device", "cpu", "--device-memory", known["smallest_device_memory"])
    found = offmoe("inspect", checkpoint, "--json", *budget).json
    plan = found["plan"]
    assert (plan["parked_layers"], plan["parked_in"]) == (3, "disk")
    assert plan["dense"] + plan["parked"] == found["dense_bytes"] == known["dense_bytes"]
    assert plan["used"] <= plan["budget"] < found["smallest_with_dense"]
    out = offmoe("inspect", checkpoint, *budget).out
    assert re.search(r"dense, elsewhere .* 3 of 3 layers, from disk in every pass", out)
    assert f"({found['smallest_with_dense']} bytes)" in out
    assert "elsewhere" not in offmoe("inspect", checkpoint, "--device", "cpu", "--device-memory", "30MiB").out.replace(
        "dense layers elsewhere", ""
    )


def test_fewer_slots_than_top_k_are_fine_and_fewer_than_two_are_refused(offmoe: Run, checkpoint: Path) -> None:
    found = offmoe("inspect", checkpoint, "--slots-per-layer", "1", "--device", "cpu", "--json").json["plan"]
    assert (found["slots_per_layer"], found["scope"]) == ([1, 1, 1], "layer")
    outcome = offmoe("inspect", checkpoint, "--slots-per-layer", "0,1,0", "--device", "cpu")
    assert (outcome.status, outcome.out) == (2, "")
    assert "1 slots in all" in outcome.err


def test_a_small_budget_is_a_pool_and_says_why(offmoe: Run, checkpoint: Path) -> None:
    known = offmoe("inspect", checkpoint, "--device", "cpu", "--json").json
    budget = ("--device", "cpu", "--device-memory", known["smallest_with_dense"])
    plan = offmoe("inspect", checkpoint, *budget, "--json").json["plan"]
    assert (plan["scope"], sum(plan["slots_per_layer"]), plan["parked_layers"]) == ("model", 2, 0)
    assert "per token expected" in plan["reason"]
    text = " ".join(offmoe("inspect", checkpoint, *budget).out.split())
    assert "2 in one pool" in text
    assert "one pool for all layers" in text
    assert "2 slots in all" in text


def test_a_folder_without_a_model(offmoe: Run, tmp_path: Path) -> None:
    outcome = offmoe("inspect", tmp_path)
    assert outcome.status == 1
    assert outcome.err.startswith("offmoe: error: ")


@pytest.mark.parametrize("size", [1, 999, (1 << 20) + 1, 1234567890, (3 << 30) + 7])
def test_sizes_to_pass_are_never_below(size: int) -> None:
    assert size <= parse_size(size_option(size), "x") <= size * 1.1 + 1


def test_beside_a_device_every_way_has_its_roofline() -> None:
    shape = CacheShape((16, 16), (2, 2), (10**6, 10**6))
    costs = CostModel(1.0, 100.0, 1000.0, h2d_gb_s=1.0, expert_us_host=500.0)
    found = {
        how: expect(
            shape,
            CacheOptions(slots_per_layer=4, host_slots=16, on_miss=how, miss_costs=costs.miss_costs(10**6)),
            Profile(costs=costs),
        )
        for how in ON_MISS
    }
    assert found["cpu"].uniform > found["fetch"].uniform, "the host takes half of what the link does"
    assert found["auto"].uniform > 0.9 * found["cpu"].uniform, "nothing to choose by, where all are equally likely"
    assert all(e.roofline >= e.uniform for e in found.values())


def test_on_a_miss_is_said(offmoe: Run, checkpoint: Path) -> None:
    argv = ("inspect", checkpoint, "--device", "cpu", "--slots-per-layer", "4")

    def said(*more: str) -> str:
        return " ".join(offmoe(*argv, *more).out.replace("│", " ").split())

    assert "fetch every missed expert gets a slot (what 'auto' means here)" in said()
    assert "cpu a missed expert gets a slot only while one is free" in said("--on-miss", "cpu")


def test_more_slots_than_experts_are_said_so(offmoe: Run, checkpoint: Path) -> None:
    outcome = offmoe("inspect", checkpoint, "--device", "cpu", "--slots-per-layer", "99")
    assert "slots_per_layer=99: a layer has 8 experts, so it gets no more slots than those" in outcome.err
    assert "8 per layer, 100.0 %" in outcome.out
    assert "slots_per_layer" not in offmoe("inspect", checkpoint, "--device", "cpu", "--slots-per-layer", "8").err


@native.installed
@pytest.mark.parametrize(("options", "form"), [((), ""), (("--dense", "int8"), " and int8")], ids=["native", "int8"])
def test_the_form_of_dense_weights_is_said(offmoe: Run, tmp_path: Path, options: tuple[str, ...], form: str) -> None:
    model = tiny.build("mixtral", torch.bfloat16, hidden_size=64, intermediate_size=64)
    found = offmoe("inspect", tiny.save(model, tmp_path / "model"), "--device", "cpu", *options)
    assert f"in bfloat16{form}, needed for" in found.out


@native.installed
def test_dense_weights_of_a_gguf_file_are_as_stored(offmoe: Run, tmp_path: Path) -> None:
    file = gguf_models.save(tmp_path, "mixtral").file
    found = offmoe("inspect", file, "--device", "cpu", "--exactness", "numeric")
    assert "in bfloat16 and as stored, needed for" in found.out

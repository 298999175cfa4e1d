"""`offmoe inspect` ranks what would run, here or on a machine by name; `generate` says what would be faster."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offmoe.cli import choices
from offmoe.cli.inspect import PREDICTED
from offmoe.device.machines import GPUS
from offmoe.profile import CostModel, Profile
from tests import tiny
from tests.cli.conftest import Outcome, byte_tokenizer

Run = Callable[..., Outcome]

MIXTRAL = Path(__file__).parents[1] / "data" / "configs" / "mixtral-8x7b.json"
QWEN = MIXTRAL.with_name("qwen3-30b-a3b.json")
MACHINE = ("--machine", "rtx-3060-12g+ddr4-3200-64g+nvme-gen4")


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A Mixtral in bf16 whose experts of 196 kB can be quantized, with a tokenizer."""
    model = tiny.build("mixtral", hidden_size=128, intermediate_size=256, vocab_size=259).to(torch.bfloat16)
    folder = tiny.save(model, tmp_path / "big")
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_ranked_table_for_a_machine_by_name(offmoe: Run) -> None:
    outcome = offmoe("inspect", QWEN, *MACHINE)
    assert (outcome.status, outcome.err) == (0, "")
    words = " ".join(outcome.out.split())
    assert "rtx-3060-12g+ddr4-3200-64g+nvme-gen4, the best first; tokens/s are predicted, not measured" in words
    assert "Predicted from the data sheets of rtx-3060-12g+ddr4-3200-64g+nvme-gen4" in words
    assert "int4: perplexity +0.75 % (demo model)" in words
    assert "native: equal to transformers, bit for bit" in words
    assert re.search(r"Best with the results of transformers \(predicted [\d.]+ tokens/s\): offmoe generate", words)
    assert "offmoe pack MODEL OUT --experts int4" in words
    assert re.search(
        r"decode [\d.]+ tokens/s \(lag=1, untried on a GPU\) or [\d.]+ \(captured in graphs, untried", words
    )
    assert "calibrate" not in words, "nobody can measure a machine that is not here"


def test_json_marks_what_is_predicted(offmoe: Run) -> None:
    found = offmoe("inspect", QWEN, *MACHINE, "--json").json
    assert found["machine"] == MACHINE[1]
    assert (found["predicted_from"], found["predicted_assuming"]) == (f"the data sheets of {MACHINE[1]}", [])
    assert found["predicted"] == []
    assert found["tokens_per_s"] is None
    ways = found["choices"]
    assert {way["experts"] for way in ways} == {"native", "int8", "int4"}
    for way in ways:
        speeds = {key for key in way if "tokens_per_s" in key or "hit_rate" in key}
        assert speeds
        assert all(key.startswith("predicted_") for key in speeds)
        assert way["predicted_most_tokens_per_s"] >= way["predicted_tokens_per_s"] > 0
    assert found["best_command"] == ways[0]["command"]
    same = next(way for way in ways if way["experts"] == "native" and way["exactness"] == "bitwise")
    assert found["best_command_same_results"] == same["command"]


def test_what_a_gpu_would_do_without_the_host_is_marked_as_predicted(offmoe: Run) -> None:
    prices = offmoe("inspect", QWEN, *MACHINE, "--json").json["decode_paths"]
    assert set(prices) == {f"predicted_{name}_tokens_per_s" for name in ("eager", "lag_1", "captured")}
    eager, lag_1, captured = prices.values()
    assert 0 < eager < lag_1 <= captured
    assert offmoe("inspect", QWEN, "--machine", "ddr5-4800-96g", "--json").json["decode_paths"] is None


def test_what_does_not_fit_gets_the_command_of_what_does(offmoe: Run) -> None:
    argv = ("inspect", MIXTRAL, *MACHINE, "--device-memory", "1GiB", "--experts", "native", "--exactness", "bitwise")
    outcome = offmoe(*argv)
    assert outcome.status == 1
    found = offmoe(*argv, "--json").json
    assert f"Nothing fits. The nearest way that does: {found['nearest_command']}" in outcome.out
    assert outcome.err.endswith(f"What fits: {found['nearest_command']}\n")
    more = shlex.split(found["nearest_command"])[4:]
    assert offmoe("inspect", MIXTRAL, *MACHINE, *more).status == 0
    nearest = found["choices"][0]
    assert not nearest["fits"]
    words = shlex.split(nearest["command"])
    assert words[:4] == ["offmoe", "generate", "MODEL", "PROMPT"]
    again = offmoe("inspect", MIXTRAL, "--machine", "rtx-a6000-48g", *words[4:], "--json")
    assert again.json["choices"][0]["fits"]


def test_a_machine_that_is_too_small_for_any_way(offmoe: Run) -> None:
    outcome = offmoe("inspect", QWEN.with_name("deepseek-v3.json"), "--machine", "ddr4-3200-4g", "--json")
    assert outcome.status == 1
    assert outcome.json["nearest_command"] is None
    assert re.search(r"smallest device_memory .*; [\d.]+ GiB more must be free for it\.$", outcome.err.strip())


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        (("--device-memory", "5MiB", "--max-context", "100000"), (("--max-context", None),)),
        (("--device-memory=5MiB", "--slots-per-layer", "8"), (("--slots-per-layer", None),)),
        (("--device-memory", "100KiB"), (("--device-memory", "MiB"),)),
    ],
)
def test_a_refused_verb_names_the_nearest_command_that_works(
    offmoe: Run, big: Path, asked: tuple[str, ...], changes: tuple[tuple[str, str | None], ...]
) -> None:
    """The command is the one that was given, but for what has to change."""
    argv = ("generate", big, "It's once", "--device", "cpu", "--experts", "native", "--exactness", "bitwise")
    more = ("--max-new-tokens", "2", "--no-state", "--json", *asked)
    refused = offmoe(*argv, *more)
    assert (refused.status, refused.out) == (1, "")
    command = refused.err.strip().partition(" What fits: ")[2]
    words = shlex.split(command)
    assert words[:4] == ["offmoe", "generate", str(big), "It's once"]
    for option, value in changes:
        assert (option in words) == (value is not None)
        assert value is None or words[words.index(option) + 1].endswith(value)
    assert {"--no-state", "--exactness"} < set(words)
    ran = offmoe(*words[1:])
    assert ran.status == 0, ran.err


def test_a_refused_verb_leaves_out_a_long_prompt(offmoe: Run, big: Path) -> None:
    refused = offmoe(
        "generate", big, "once " * 50, "--device", "cpu", "--device-memory", "100KiB", "--exactness=bitwise"
    )
    assert f"What fits: offmoe generate {big} PROMPT --device cpu --exactness=bitwise --device-memory" in refused.err


def test_the_commands_run(offmoe: Run, big: Path) -> None:
    """Every command of the table, as it stands but for the prompt."""
    argv = ("inspect", big, "--device", "cpu", "--device-memory", "5MiB", "--json")
    ways = offmoe(*argv).json["choices"]
    assert len({way["command"] for way in ways}) == len(ways)
    for way in ways:
        words = shlex.split(way["command"])
        assert words[:4] == ["offmoe", "generate", str(big), "PROMPT"]
        ran = offmoe("generate", big, "Once", *words[4:], "--max-new-tokens", 2, "--json")
        assert ran.status == 0, ran.err
        assert sum(ran.json["memory"]["slots_per_layer"]) >= way["slots"]
        assert ran.json["memory"]["max_context"] == way["max_context"]


def test_this_machine_is_probed_where_nothing_was_measured(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    argv = ("inspect", checkpoint, "--device", "cpu", "--json")
    probed = offmoe(*argv).json
    assert probed["predicted_from"].startswith("a probe of this machine in ")
    assert probed["machine"] is None
    assert probed["predicted_assuming"] == []
    assert all(way["predicted_tokens_per_s"] > 0 for way in probed["choices"])
    alone = offmoe("inspect", checkpoint / "config.json", "--device", "cpu", "--json").json
    assert alone["predicted_assuming"] == ["a disk of kind nvme-gen3"]
    profile = tmp_path / "p.json"
    Profile(costs=CostModel(disk_gb_s=1.0, expert_us_device=1000.0, dense_us_per_token=4000.0)).write(profile)
    measured = offmoe(*argv, "--profile", profile).json
    assert measured["predicted_from"] == "the profile's costs"
    assert measured["predicted"] == [name for name in PREDICTED if name != "on_miss"], "nothing is missed"
    native = next(way for way in measured["choices"] if way["exactness"] == "bitwise")
    assert native["predicted_most_tokens_per_s"] == pytest.approx(100)
    assert f"--profile {profile}" in native["command"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--machine", "rtx-3061"), "'rtx-3061' is no known part. Did you mean rtx-3060-12g"),
        (("--machine", "ddr4-3200", "--device", "cuda"), "has no GPU for --device cuda"),
        (("--machine", "rtx-3060", "--device-memory", "16GiB"), "11.5 GiB are free on rtx-3060-12g"),
    ],
)
def test_machines_that_contradict(offmoe: Run, argv: tuple[str, ...], says: str) -> None:
    outcome = offmoe("inspect", QWEN, *argv)
    assert (outcome.status, outcome.out) == (2, "")
    assert says in outcome.err


def test_memory_of_a_machine_follows_the_options(offmoe: Run) -> None:
    by_ram = offmoe("inspect", QWEN, "--machine", "rtx-3060", "--host-memory", "80GiB", "--json").json
    assert by_ram["plan"]["host"]["budget"] == 80 << 30
    on_cpu = offmoe("inspect", QWEN, "--machine", "rtx-3060", "--device", "cpu", "--json").json
    assert (on_cpu["device"], on_cpu["machine"]) == ("cpu", "ddr4-3200-32g+nvme-gen3")
    capped = offmoe("inspect", QWEN, "--machine", "ddr5-6000", "--device-memory", "48GiB", "--json").json
    assert capped["plan"]["budget"] == 48 << 30


def test_all_machines_are_listed(offmoe: Run) -> None:
    outcome = offmoe("inspect", "--machine", "list")
    assert outcome.status == 0
    for name in (*GPUS, "ddr4-3200", "nvme-gen4"):
        assert name in outcome.out
    listed = offmoe("inspect", "--machine", "list", "--json").json
    assert listed["gpus"]["rtx-3060-12g"] == {
        "memory_gib": 12,
        "memory_gb_s": pytest.approx(360),
        "link_gb_s": pytest.approx(31.5, rel=1e-3),
    }
    assert listed["ram_gb_s"]["ddr4-3200"] == pytest.approx(51.2)


def test_inspect_needs_a_model(offmoe: Run) -> None:
    outcome = offmoe("inspect")
    assert outcome.status == 2
    assert "MODEL is missing" in outcome.err


SLOW_DISK = CostModel(disk_gb_s=0.001, expert_us_device=1.0, dense_us_per_token=1.0)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that finds a disk at which bytes are all that counts."""

    def costs(*_: object) -> tuple[object, str, tuple[()]]:
        def of(form: object, exactness: str) -> CostModel:
            return SLOW_DISK

        return of, "a probe", ()

    monkeypatch.setattr(choices, "costs_for", costs)


@pytest.mark.usefixtures("slow_disk")
def test_generate_says_what_would_be_faster(offmoe: Run, big: Path) -> None:
    argv = ("generate", big, "Once", "--device", "cpu", "--max-new-tokens", 2)
    tight = offmoe(*argv, "--device-memory", "4500KiB")
    assert tight.status == 0
    line = next(line for line in tight.err.splitlines() if "would give" in line)
    assert re.fullmatch(
        r"--experts int[48] would give about [\d.]+ times the tokens/s \(predicted from a probe: [\d.e+]+ in place of "
        r"[\d.e+]+; perplexity \+0\.\d+ % \(demo model\)\)",
        line,
    )


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("more", [(), ("--experts", "int8"), ("--slots-per-layer", "2"), ("--exactness", "bitwise")])
def test_generate_is_silent_where_it_does_not_matter(offmoe: Run, big: Path, more: tuple[str, ...]) -> None:
    """Everything is resident, or the options say what to do."""
    outcome = offmoe("generate", big, "Once", "--device", "cpu", "--max-new-tokens", 2, *more)
    assert outcome.status == 0
    assert "would give" not in outcome.err

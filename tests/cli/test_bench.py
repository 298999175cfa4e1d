from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offmoe.bench import contender, rounds
from offmoe.bench.messages import Costs, Pass, Task
from offmoe.bench.messages import Outcome as Done
from offmoe.cli import bench
from tests import tiny
from tests.cli.conftest import Outcome, byte_tokenizer

Run = Callable[..., Outcome]


class Here:
    """A contender in this process: tests/bench/test_rounds.py has the real ones."""

    def __init__(self, name: str, task: Task, cap: int | None = None):
        assert cap is None
        self._contender = contender.Contender(task)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        self._contender.close()

    def run(self, work: Pass) -> Done:
        return self._contender.run(work)

    def costs(self) -> Costs:
        return self._contender.costs()

    def peak(self) -> dict[str, int | None]:
        return self._contender.peak()


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(bench, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(contender, "COMPUTE_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "ContenderProcess", Here)


def test_against_accelerate_on_a_replayed_routing(offmoe: Run, tmp_path: Path) -> None:
    """In bf16: float32 products depend on where weights stand in memory, and accelerate leaves them in mapped files."""
    checkpoint = tiny.save(tiny.build("mixtral", torch.bfloat16, vocab_size=259), tmp_path / "mixtral")
    byte_tokenizer().save_pretrained(checkpoint)
    trace, scratch = tmp_path / "t.npz", tmp_path / "scratch"
    scratch.mkdir()
    assert offmoe("generate", checkpoint, "a", "--max-new-tokens", "8", "--device", "cpu", "--trace", trace).status == 0
    argv = ["bench", checkpoint, "--device", "cpu", "--device-memory", "4MiB", "--slots-per-layer", "4"]
    argv += ["--rounds", "1", "--new-tokens", "3", "--prompt", "ab", "--scratch", scratch]
    outcome = offmoe(*argv, "--against", "accelerate", "--replay-routing", trace, "--json")
    found = outcome.json
    assert found.keys() >= {"ours", "baseline", "ratio", "roofline"}
    assert found["same"] == {"tokens": True, "logits": True}
    assert (found["against"], found["rounds"], found["new_tokens"]) == ("accelerate", 1, 3)
    assert (found["routing"], found["tokens"]) == ("replayed", "greedy")
    assert found["ratio"]["least"] <= found["ratio"]["median"] <= found["ratio"]["most"]
    assert found["roofline"]["share"] > 0
    assert found["baseline"]["hit_rate"] is None
    said = " ".join(outcome.err.split())
    assert "tokens equal, logits equal" in said
    assert "not the model's: the text is meaningless" in said
    assert list(scratch.iterdir()) == []


def test_int4_experts_against_the_checkpoint_that_they_were_made_of(
    offmoe: Run, checkpoint: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    assert offmoe("pack", checkpoint, packed, "--experts", "int8").status == 0
    options = ["--device", "cpu", "--device-memory", "4MiB", "--slots-per-layer", "4", "--experts", "int8", "--json"]
    options += ["--rounds", "1", "--new-tokens", "2", "--prompt", "ab", "--against", "accelerate"]
    outcome = offmoe("bench", packed, "--against-model", checkpoint, *options)
    assert outcome.json["same"] is None
    assert outcome.json["ratio"]["median"] > 0
    assert "weights are not the same" in " ".join(outcome.err.split())
    assert offmoe("bench", checkpoint, *options).json["same"] is None  # quantized while loading


def test_against_itself_without_prefetch(offmoe: Run, checkpoint: Path) -> None:
    argv = ("bench", checkpoint, "--device", "cpu", "--device-memory", "4MiB", "--slots-per-layer", "4")
    outcome = offmoe(
        *argv, "--rounds", "2", "--new-tokens", "3", "--against", "no-prefetch", "--random-tokens", "--prompt-tokens", 4
    )
    assert outcome.status == 0
    for words in ("medians of 2 rounds", "no-prefetch", "bound per token: disk", "times as fast per token"):
        assert words in outcome.out


def test_what_is_measured_prefetches(offmoe: Run, checkpoint: Path) -> None:
    argv = ["--device", "cpu", "--device-memory", "4MiB", "--slots-per-layer", "4", "--json"]
    argv += ["--rounds", "1", "--new-tokens", "8", "--prompt", "ab", "--prefetch", "2", "--against", "no-prefetch"]
    found = offmoe("bench", checkpoint, *argv).json
    assert found["ours"]["prefetched_per_token"] > 0
    assert found["baseline"]["prefetched_per_token"] == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--against", "vllm"], "--against 'vllm' is unknown"),
        (["--against-model", "m"], "add --against accelerate"),
        (["--prompt", "a", "--prompt-tokens", "3"], "both given"),
        (["--new-tokens", "1"], "use 2 or more"),
        (["--rounds", "0"], "--rounds: '0'"),
        (["--memory-cap", "much"], "memory_cap='much' is not a size"),
    ],
)
def test_wrong_options(offmoe: Run, checkpoint: Path, more: list[str], says: str) -> None:
    outcome = offmoe("bench", checkpoint, "--device", "cpu", "--device-memory", "4MiB", *more)
    assert (outcome.status, outcome.out) == (2, "")
    assert says in outcome.err


@pytest.mark.parametrize(("scratch", "says"), [("/no/such", "is no folder"), (".", "give --scratch FOLDER")])
def test_no_room_for_what_accelerate_writes(
    offmoe: Run, checkpoint: Path, monkeypatch, scratch: str, says: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("usage", (), {"free": 1000})())
    argv = ("bench", checkpoint, "--device", "cpu", "--device-memory", "4MiB", "--against", "accelerate")
    outcome = offmoe(*argv, "--scratch", scratch)
    assert outcome.status == 2
    assert says in outcome.err

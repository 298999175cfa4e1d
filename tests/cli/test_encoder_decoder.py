"""The commands on a model with an encoder: the prompt goes into the encoder, the text comes out of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from offmoe.bench import contender, rounds
from offmoe.cli import bench
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from tests import tiny
from tests.cli.conftest import Outcome, byte_tokenizer
from tests.cli.test_bench import Here
from tests.hf.adapters.test_find import CONFIGS

Run = Callable[..., Outcome]

CPU = ("--device", "cpu", "--slots-per-layer", "3")
PROMPT = "Once upon"


def make_switch(folder: Path, dtype: torch.dtype) -> Path:
    """A Switch of 4 + 2 layers, of which 2 + 1 have 8 experts."""
    config = AutoConfig.for_model("switch_transformers", **{**CONFIGS["switch_transformers"], "vocab_size": 259})
    tiny.save(tiny.random_model(config, dtype), folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_switch(tmp_path_factory.mktemp("checkpoint") / "switch", torch.float32)


def test_text_is_that_of_the_stock_model(offmoe: Run, switch: Path) -> None:
    found = offmoe("generate", switch, PROMPT, *CPU, "--max-new-tokens", 12, "--json").json
    tokenizer, model = AutoTokenizer.from_pretrained(switch), AutoModelForSeq2SeqLM.from_pretrained(switch)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert found["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert (found["prompt_tokens"], found["new_tokens"]) == (len(PROMPT), len(ids) - 1)
    assert found["memory"]["slots_per_layer"] == [3, 3, 3]


def test_context_holds_prompt_first_token_and_new_ones(offmoe: Run, switch: Path) -> None:
    tight = (*CPU, "--max-context", len(PROMPT) + 4, "--json", "--max-new-tokens")
    assert offmoe("generate", switch, PROMPT, *tight, 4).status == 0
    outcome = offmoe("generate", switch, PROMPT, *tight, 5)
    assert outcome.status == 1
    assert f"--max-context {len(PROMPT) + 5}" in outcome.err


def test_recording_replays(offmoe: Run, switch: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon\na time\n")
    file = tmp_path / "trace.npz"
    found = offmoe(
        "trace", switch, "--prompts", tmp_path / "prompts.txt", "-o", file, *CPU, "--max-new-tokens", 6, "--json"
    ).json
    trace = read_trace(file)
    assert trace.requests == found["requests"] == 2
    assert trace.options is not None
    stats = replay(trace, trace.options).stats
    assert [stats.hits, stats.pending, stats.misses] == [found["stats"][name] for name in ("hits", "pending", "misses")]


def test_inspect_counts_both_sides(offmoe: Run, switch: Path) -> None:
    found = offmoe("inspect", switch, *CPU, "--json").json
    assert (found["layers"], found["moe_layers"], found["experts"], found["top_k"]) == (6, 3, 8, 1)


def test_bench_against_accelerate_on_a_recording(offmoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16: float32 products depend on where weights stand in memory, and accelerate leaves them in mapped files."""
    switch = make_switch(tmp_path / "switch", torch.bfloat16)
    monkeypatch.setattr(bench, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(contender, "COMPUTE_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "ContenderProcess", Here)
    recording = tmp_path / "t.npz"
    assert offmoe("generate", switch, PROMPT, *CPU, "--max-new-tokens", 6, "--trace", recording).status == 0
    argv = ("bench", switch, *CPU, "--device-memory", "4MiB", "--against", "accelerate", "--scratch", tmp_path)
    found = offmoe(*argv, "--rounds", 1, "--new-tokens", 4, "--replay-routing", recording, "--json").json
    assert found["same"] == {"tokens": True, "logits": True}
    assert found["ours"]["hit_rate"] > 0
    assert found["roofline"]["compute_ms"] > 0

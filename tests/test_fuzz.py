"""Options x calls x configuration files against stock transformers: no traceback and no silent difference.

The quick suite runs 100 cases, the same every time. The slow tests run 2,000, and 50 through real command lines.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from offmoe.cli import main
from offmoe.errors import OffmoeError
from tests import fuzzing, tiny
from tests.cli.conftest import byte_tokenizer

CASES: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}
PROMPT = "Once upon"
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> fuzzing.Checkpoints:
    return fuzzing.Checkpoints(tmp_path_factory.mktemp("fuzz"))


@settings(max_examples=100, **CASES)
@given(case=fuzzing.cases())
def test_a_case_is_as_in_stock_or_refused(checkpoints: fuzzing.Checkpoints, case: fuzzing.Case) -> None:
    assert fuzzing.check(checkpoints, case) is None


@pytest.mark.slow
@settings(max_examples=2000, **CASES)
@given(case=fuzzing.cases())
def test_two_thousand_cases_are_as_in_stock_or_refused(checkpoints: fuzzing.Checkpoints, case: fuzzing.Case) -> None:
    assert fuzzing.check(checkpoints, case) is None


def test_the_oracle_notices(checkpoints: fuzzing.Checkpoints) -> None:
    """A run with other results, with an error, or with a refusal that is not documented, is a fault."""
    same = fuzzing.Outcome(results=[{"logits": torch.zeros(2)}])
    for got in (
        fuzzing.Outcome(results=[{"logits": torch.tensor([0.0, 1e-45])}]),
        fuzzing.Outcome(results=[{"logits": torch.zeros(2, dtype=torch.float64)}]),
        fuzzing.Outcome(results=[ValueError("a bug")]),
        fuzzing.Outcome(failure=ValueError("a bug")),
        fuzzing.Outcome(failure=OffmoeError("no reason")),
    ):
        assert fuzzing.fault(same, got) is not None
        assert fuzzing.fault(got, got) is None or got.failure is not None
    assert fuzzing.fault(fuzzing.Outcome(failure=ValueError("stock refuses")), same) is not None
    assert fuzzing.fault(fuzzing.Outcome(results=same.results, random_weights=True), same) is not None


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save(tiny.build("mixtral", vocab_size=259), tmp_path_factory.mktemp("fuzz-cli") / "model")
    byte_tokenizer().save_pretrained(folder)
    return folder


def stock_texts(folder: Path) -> list[str] | Exception:
    """What stock generates with a model's own settings, greedy if they do not ask for beams."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    try:
        model = tiny.comparable(AutoModelForCausalLM.from_pretrained(folder))
        config = model.generation_config
        if (config.num_beams or 1) == 1:  # as the command line, which samples only if it is asked to
            config.num_return_sequences = 1
        out = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, tokenizer=tokenizer if config.stop_strings else None
        )
    except Exception as error:
        return error
    sequences = getattr(out, "sequences", out)
    return [str(tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)) for row in sequences]


def run(argv: list[str], capsys: pytest.CaptureFixture[str] | None) -> tuple[int, str, str]:
    """A command in this process, or without `capsys` in its own."""
    if capsys is not None:
        return main(argv), *capsys.readouterr()
    done = subprocess.run([sys.executable, "-m", "offmoe", *argv], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def check_commands(source: Path, tmp_path: Path, values: dict[str, Any], capsys: Any, verbs: tuple[str, ...]) -> None:
    """Each verb does what stock does with a generation_config.json of these values, or says why not in one line."""
    tmp_path.mkdir(exist_ok=True)
    folder, record, prompts = tmp_path / "model", tmp_path / "run.npz", tmp_path / "prompts.txt"
    shutil.copytree(source, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    prompts.write_text(PROMPT + "\n")
    want = stock_texts(folder)
    common = ["--device", "cpu", "--slots-per-layer", "3", "--json"]
    commands = {
        "generate": ["generate", str(folder), PROMPT, "--max-new-tokens", str(NEW_TOKENS)],
        "plain": ["generate", str(folder), PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--no-generation-config"],
        "trace": ["trace", str(folder), "--prompts", str(prompts), "-o", str(record), "--max-new-tokens", "2"],
        "bench": ["bench", str(folder), "--rounds", "1", "--new-tokens", "2", "--prompt-tokens", "4"],
    }
    for verb in verbs:
        status, out, err = run([*commands[verb], *common], capsys)
        assert "Traceback" not in err, (verb, err)
        if status == 0 and verb == "generate":
            assert not isinstance(want, Exception), (want, out)
            found = json.loads(out)
            assert found.get("texts", [found["text"]]) == want
        elif verb in ("plain", "bench"):
            assert status == 0, err
        elif status:
            # A value of a wrong kind is refused, also one that greedy decoding does not look at.
            assert isinstance(want, Exception) or "download the file again" in err, (verb, err)
            errors = [line for line in err.splitlines() if line.startswith("offmoe: error: ")]
            assert len(errors) == 1, err
            assert "generation_config.json" in errors[0]
            assert "--no-generation-config" in errors[0] or "download the file again" in errors[0]


GENERATION_FILES = fuzzing.values_of(fuzzing.SETTINGS, most=4, junk=8)


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7},
        {"num_return_sequences": 3},
        {"stop_strings": ["e"]},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "static"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"dola_layers": "low"},
        {"prompt_lookup_num_tokens": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"max_time": 100.0, "forced_eos_token_id": 2},
        {"compile_config": {"mode": "default"}},
        {"force_words_ids": [[5]], "num_beams": 2},
    ],
    ids=lambda values: ",".join(values),
)
def test_a_generation_setting_in_every_verb(
    with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any]
) -> None:
    check_commands(with_tokenizer, tmp_path, values, capsys, ("generate", "plain", "trace"))


def test_a_setting_through_real_command_lines(with_tokenizer: Path, tmp_path: Path) -> None:
    check_commands(with_tokenizer, tmp_path / "beams", {"num_beams": 3}, None, ("generate",))
    check_commands(with_tokenizer, tmp_path / "other", {"cache_implementation": "quantized"}, None, ("generate",))


@pytest.mark.slow
@settings(max_examples=50, **CASES)
@given(values=GENERATION_FILES, verb=st.sampled_from(["generate", "plain", "trace", "bench"]))
def test_fifty_real_command_lines(
    with_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], verb: str
) -> None:
    check_commands(with_tokenizer, tmp_path_factory.mktemp("command"), values, None, (verb,))

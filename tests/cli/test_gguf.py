"""GGUF files on the command line: a file is a model, with the tokenizer that stands in it or beside it."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError
from offmoe.hf.load.tokenizer import load_tokenizer
from offmoe.trace.trace import read_trace
from tests import gguf_models, tiny
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
CPU = ("--device", "cpu", "--slots-per-layer", "3")
PROMPT = "The king said"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> gguf_models.Written:
    return gguf_models.save_demo(tmp_path_factory.mktemp("demo"))


def stock_text(folder: Path, new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: tiny.Model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_text_is_that_of_a_dense_model_of_the_decoded_values(offmoe: Run, demo: gguf_models.Written) -> None:
    outcome = offmoe("generate", demo.file, PROMPT, *CPU, "--exactness", "bitwise", "--max-new-tokens", 16, "--json")
    assert outcome.status == 0
    assert outcome.json["text"] == stock_text(demo.dense, 16)


def test_a_server_answers_from_a_file(demo: gguf_models.Written) -> None:
    pytest.importorskip("starlette", reason="the extra offmoe[serve] is not installed")
    options = [*CPU, "--exactness", "bitwise", "--port", "0", "--json"]
    command = [sys.executable, "-m", "offmoe", "serve", str(demo.file), *options]
    body = json.dumps({"prompt": PROMPT, "max_tokens": 16, "temperature": 0}).encode()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body), timeout=60) as reply:
                answer = json.load(reply)
        finally:
            process.terminate()
    assert answer["choices"][0]["text"] == stock_text(demo.dense, 16)


def test_inspect_names_the_format(offmoe: Run, demo: gguf_models.Written) -> None:
    found = offmoe("inspect", demo.file, *CPU, "--json").json
    assert (found["family"], found["layers"], found["top_k"]) == ("mixtral", 6, 2)
    assert found["experts"] in (8, [8] * 6)
    text = offmoe("inspect", demo.file, *CPU)
    assert text.status == 0
    assert "gguf" in text.out


def test_the_command_that_inspect_prints_runs_the_file_that_was_asked_for(
    offmoe: Run, demo: gguf_models.Written, tmp_path: Path
) -> None:
    for name in ("a.gguf", "b file.gguf"):
        shutil.copy(demo.file, tmp_path / name)
    assert "--gguf-file NAME" in offmoe("inspect", tmp_path, *CPU).err
    found = offmoe("inspect", tmp_path, "--gguf-file", "b file.gguf", *CPU, "--json").json
    words = shlex.split(found["best_command"])
    assert words[words.index("--gguf-file") + 1] == "b file.gguf"
    assert offmoe(*(PROMPT if word == "PROMPT" else word for word in words[1:]), "--max-new-tokens", 1).status == 0
    with pytest.raises(CapacityError, match=r"What would fit: offmoe inspect .* --gguf-file 'b file\.gguf'$"):
        inspect(tmp_path, OffloadConfig(device="cpu", device_memory=1), gguf_file="b file.gguf")


def test_a_configuration_alone_is_not_the_file_that_was_asked_for(offmoe: Run, tmp_path: Path) -> None:
    shutil.copy(gguf_models.DEMO / "config.json", tmp_path)
    outcome = offmoe("inspect", tmp_path, "--gguf-file", "m.gguf", *CPU)
    assert outcome.status == 2
    assert "has no GGUF file 'm.gguf'" in outcome.err


def test_inspect_says_that_a_gpu_has_no_kernels_for_blocks(
    offmoe: Run, demo: gguf_models.Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    on_gpu = offmoe("inspect", demo.file, "--machine", "rtx-3060")
    assert on_gpu.status == 0
    assert "by torch on decoded blocks" in on_gpu.out
    assert "a GPU has no kernels for GGUF yet" in on_gpu.out


def test_trace_records_a_file(offmoe: Run, demo: gguf_models.Written, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\nOnce more")
    traced = offmoe(
        "trace", demo.file, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "run.npz", *CPU,
        "--max-new-tokens", 4, "--json",
    )  # fmt: skip
    assert traced.status == 0
    trace = read_trace(tmp_path / "run.npz")
    assert trace.shape.experts == (8,) * 6
    assert trace.parameters is not None
    assert trace.parameters.expert == (3 * 128 * 256,) * 6  # weights, however many words they are
    assert offmoe("inspect", demo.file, *CPU, "--json").json["dense_parameters"] == trace.parameters.dense


@pytest.mark.slow
def test_bench_runs_a_file_in_a_process_of_its_own(offmoe: Run, demo: gguf_models.Written) -> None:
    measured = offmoe("bench", demo.file, *CPU, "--rounds", 1, "--new-tokens", 3, "--json")
    assert measured.status == 0
    assert measured.json["ours"]


def test_bench_against_stock_needs_a_safetensors_checkpoint(offmoe: Run, demo: gguf_models.Written) -> None:
    refused = offmoe("bench", demo.file, *CPU, "--against", "accelerate")
    assert refused.status == 2
    assert "name the model's safetensors checkpoint with --against-model" in refused.err


def test_pack_refuses_a_file(offmoe: Run, demo: gguf_models.Written, tmp_path: Path) -> None:
    outcome = offmoe("pack", demo.file, tmp_path / "out")
    assert outcome.status == 2
    assert "packed already" in outcome.err


def test_a_tokenizer_beside_the_file_wins_over_the_one_in_it(
    demo: gguf_models.Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = shutil.copy(demo.file, tmp_path)
    with caplog.at_level(logging.INFO, "offmoe"):
        inside = load_tokenizer(Path(file))
    assert "the tokenizer is that of the file's metadata" in caplog.text
    text = "The king of Naples, being 3 times an enemy"
    original = AutoTokenizer.from_pretrained(gguf_models.DEMO)
    assert inside(text)["input_ids"] == original(text)["input_ids"]
    original.chat_template = "beside"
    original.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "offmoe"):
        assert load_tokenizer(Path(file)).chat_template == "beside"
    assert f"the tokenizer is that of {tmp_path / 'tokenizer.json'}" in caplog.text
    (tmp_path / "tokenizer.json").unlink()  # settings alone say nothing against the vocabulary in the file
    assert load_tokenizer(Path(file))(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_beside_the_file_is_taken(
    offmoe: Run, demo: gguf_models.Written, tmp_path: Path, name: str
) -> None:
    file = shutil.copy(demo.file, tmp_path)
    template = "beside {{ messages[0].content }}"
    (tmp_path / name).write_text(template if name.endswith("jinja") else json.dumps({"chat_template": template}))
    assert load_tokenizer(Path(file)).chat_template == template
    if name == "tokenizer_config.json":
        several = [{"name": "default", "template": template}, {"name": "rag", "template": "other"}]
        (tmp_path / name).write_text(json.dumps({"chat_template": several}))
        found = load_tokenizer(Path(file)).apply_chat_template([{"role": "user", "content": "me"}], tokenize=False)
        assert found == "beside me"
    (tmp_path / name).write_bytes(b"\xff")
    outcome = offmoe("generate", file, PROMPT, *CPU)
    assert outcome.status == 1
    assert f"{tmp_path / name}: cannot be read" in outcome.err


def test_a_split_of_text_that_transformers_does_not_know_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = gguf_models.save(tmp_path, "mixtral", more=gguf_models.vocabulary)
    raw = written.file.read_bytes()
    written.file.write_bytes(raw.replace(b"\5\0\0\0\0\0\0\0gpt-2", b"\5\0\0\0\0\0\0\0novel"))
    with caplog.at_level(logging.WARNING, "offmoe"):
        load_tokenizer(written.file)
    assert "splits text as 'novel' does, which transformers does not know" in caplog.text


def test_a_file_without_a_vocabulary_says_what_to_do(offmoe: Run, tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "mixtral")
    outcome = offmoe("generate", written.file, "hello", *CPU)
    assert outcome.status == 1
    assert "tokenizer.json and tokenizer_config.json of the model, and put them beside the file" in outcome.err

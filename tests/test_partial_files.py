"""Index and side files that are damaged, partial or contradictory: as stock treats them, or the true cause."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.errors import CheckpointError, MissingTensorError, OffmoeError
from offmoe.hf.hub.model_files import TEMPLATES
from offmoe.pack.pack import pack, weight_format
from offmoe.storage.checkpoint import INDEX_FILE
from tests import tiny

GENERATION = "generation_config.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
DENSE = "model.layers.1.self_attn.q_proj.weight"
NOT_THERE = "model.layers.0.self_attn.rotary_emb.inv_freq"
PROMPT = tiny.prompt(2, 9)

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def read_index(folder: Path) -> dict[str, dict[str, str]]:
    index: dict[str, dict[str, str]] = json.loads((folder / INDEX_FILE).read_text())
    return index


def shards(folder: Path) -> list[str]:
    return sorted(set(read_index(folder)["weight_map"].values()))


def index(change: Callable[[dict[str, str], list[str]], object]) -> Edit:
    """Change the index: change(weight_map, names of the shards)."""

    def edit(folder: Path) -> None:
        values = read_index(folder)
        change(values["weight_map"], shards(folder))
        (folder / INDEX_FILE).write_text(json.dumps(values))

    return edit


def elsewhere(name: str) -> Edit:
    """The index places a tensor in a shard that does not have it."""
    return index(lambda weights, files: weights.update({name: next(file for file in files if file != weights[name])}))


def twice(name: str, at: int) -> Edit:
    """Another tensor of the same name stands in the first or the last shard."""

    def edit(folder: Path) -> None:
        tensor, shard = tiny.tensor(folder, name), folder / shards(folder)[at]
        assert read_index(folder)["weight_map"][name] != shard.name
        save_file(load_file(shard) | {name: tensor * 2}, shard, metadata={"format": "pt"})

    return edit


def lost(name: str) -> Edit:
    """The index names a tensor that no shard has."""

    def edit(folder: Path) -> None:
        shard = folder / read_index(folder)["weight_map"][name]
        save_file({k: v for k, v in load_file(shard).items() if k != name}, shard, metadata={"format": "pt"})

    return edit


def named_twice(folder: Path) -> None:
    """JSON objects may name a key twice; the last one counts."""
    text = (folder / INDEX_FILE).read_text()
    assert '"weight_map": {' in text
    (folder / INDEX_FILE).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{EXPERT}": "no.safetensors",'))


def content(name: str, data: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(data)


def as_folder(folder: Path) -> None:
    (folder / GENERATION).unlink(missing_ok=True)
    (folder / GENERATION).mkdir()


def outputs(model: tiny.Model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(PROMPT).logits, model.generate(PROMPT[:1], max_new_tokens=4, do_sample=False)


LOADED: dict[str, Edit] = {
    "index names a tensor that is nowhere and not needed": index(lambda w, files: w.update({NOT_THERE: files[0]})),
    "index leaves out a tensor of an expert": index(lambda w, files: w.pop(EXPERT)),
    "index leaves out a dense tensor": index(lambda w, files: w.pop(DENSE)),
    "index places an expert wrong": elsewhere(EXPERT),
    "index places a dense tensor wrong": elsewhere(DENSE),
    "index names a tensor twice": named_twice,
    "expert twice, the other one last": twice(EXPERT, -1),
    "expert twice, the other one first": twice(EXPERT, 0),
    "dense tensor twice, the other one last": twice(DENSE, -1),
    "empty safetensors that the index does not name": content("more.safetensors", b""),
    "empty pickle": content("pytorch_model.bin", b""),
    "generation_config.json is empty": content(GENERATION, b""),
    "generation_config.json is cut off": content(GENERATION, b'{"eos_token_id": '),
    "generation_config.json has a byte order mark": content(GENERATION, b'\xef\xbb\xbf{"eos_token_id": 5}'),
    "generation_config.json is binary": content(GENERATION, b"\xff\xfe\x00"),
    "generation_config.json is a folder": as_folder,
}


@pytest.mark.parametrize("edit", LOADED.values(), ids=LOADED)
def test_what_stock_loads_is_loaded_with_the_same_bits(folder: Path, edit: Edit) -> None:
    edit(folder)
    wanted = outputs(tiny.comparable(AutoModelForCausalLM.from_pretrained(folder)))
    model = offmoe.from_pretrained(folder, slots_per_layer=3)
    with model.offload:
        assert all(map(torch.equal, outputs(model), wanted))


def test_settings_that_are_left_out_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / GENERATION).write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="offmoe"):
        offmoe.from_pretrained(folder, slots_per_layer=3).offload.close()
    assert [record for record in caplog.messages if f"{folder / GENERATION}: not JSON" in record]


@pytest.mark.parametrize("name", [EXPERT, DENSE])
def test_an_index_that_names_what_is_lost_is_the_cause(folder: Path, name: str) -> None:
    """Stock gives a dense weight random values, and says of an expert that a conversion failed."""
    file = read_index(folder)["weight_map"][name]
    lost(name)(folder)
    with pytest.raises(MissingTensorError, match=rf"{INDEX_FILE} places tensor '{name}' in {file}, where it is not"):
        offmoe.from_pretrained(folder, slots_per_layer=3)


def test_a_download_without_a_tensor_is_the_cause_if_the_index_says_so_too(folder: Path) -> None:
    lost(EXPERT)(folder)
    index(lambda weights, files: weights.pop(EXPERT))(folder)
    with pytest.raises(MissingTensorError, match=rf"no tensor '{EXPERT}'.*complete the download$"):
        offmoe.from_pretrained(folder, slots_per_layer=3)


def without_metadata(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": read_index(folder)["weight_map"]}))


REFUSED: dict[str, tuple[Edit, str]] = {
    "index without metadata": (without_metadata, rf'{INDEX_FILE}: has no "metadata"'),
    "index with a byte order mark": (
        lambda folder: (folder / INDEX_FILE).write_bytes(b"\xef\xbb\xbf" + (folder / INDEX_FILE).read_bytes()),
        rf"{INDEX_FILE}: not a JSON index .*BOM",
    ),
    "index that is empty": (content(INDEX_FILE, b""), rf"{INDEX_FILE}: not a JSON index"),
    "index of a shard outside": (
        index(lambda w, files: w.update({EXPERT: "../x.safetensors"})),
        rf"{INDEX_FILE}: places tensor '{EXPERT}' in '\.\./x\.safetensors', which is not .* inside the folder",
    ),
    "index of a shard that is not there": (
        index(lambda w, files: w.update({NOT_THERE: "other.safetensors"})),
        r"other\.safetensors: this shard of the checkpoint is missing",
    ),
    "shard of zero bytes": (
        lambda folder: (folder / shards(folder)[1]).write_bytes(b""),
        r"model-00002-.*: its 0 bytes cannot hold",
    ),
    "model.safetensors of zero bytes": (content("model.safetensors", b""), r"model\.safetensors: its 0 bytes cannot"),
    "config.json with a byte order mark": (
        lambda folder: (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()),
        r"config\.json: not JSON .*BOM",
    ),
    "config.json of zero bytes": (content("config.json", b""), r"config\.json: not JSON"),
    "generation_config.json that is a list": (content(GENERATION, b"[]"), rf"{GENERATION}: not a JSON object"),
}


@pytest.mark.parametrize(("edit", "cause"), REFUSED.values(), ids=REFUSED)
def test_what_stock_cannot_load_is_refused_with_the_cause(folder: Path, edit: Edit, cause: str) -> None:
    edit(folder)
    with pytest.raises(CheckpointError, match=cause) as refused:
        offmoe.from_pretrained(folder, slots_per_layer=3)
    assert isinstance(refused.value, OffmoeError)
    if "outside" not in cause and "inside the folder" not in cause:  # stock follows the index out of the folder
        with pytest.raises(Exception):  # noqa: B017, PT011 -- whatever stock raises
            AutoModelForCausalLM.from_pretrained(folder)


def test_the_folder_of_chat_templates_goes_with_the_model(folder: Path, tmp_path: Path) -> None:
    (folder / TEMPLATES).mkdir()
    (folder / TEMPLATES / "tool_use.jinja").write_text("{{ messages }}")
    (folder / TEMPLATES / "notes.md").write_text("")
    model = offmoe.from_pretrained(folder, slots_per_layer=3)
    with model.offload:
        model.save_pretrained(tmp_path / "saved")
    wide = tiny.save(tiny.build("mixtral", hidden_size=64, intermediate_size=64), tmp_path / "wide")
    shutil.copytree(folder / TEMPLATES, wide / TEMPLATES)
    pack(wide, tmp_path / "packed", weight_format("int8"))
    for copy in (tmp_path / "saved", tmp_path / "packed"):
        assert (copy / TEMPLATES / "tool_use.jinja").read_text() == "{{ messages }}"
        assert not (copy / TEMPLATES / "notes.md").exists()

"""A checkpoint with more shards than the process may open files: loads, generates, and keeps few of them open."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.cli import main
from offmoe.storage.checkpoint import INDEX_FILE, SINGLE_FILE
from offmoe.storage.open_shards import MOST_OPEN
from tests import tiny

resource = pytest.importorskip("resource")


def one_tensor_per_shard(folder: Path, **sizes: int) -> Path:
    """A checkpoint of which every tensor is a file."""
    tiny.save(tiny.build("mixtral", torch.bfloat16, **sizes), folder, max_shard_size="1GB")
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    weight_map = {name: f"model-{i:05}.safetensors" for i, name in enumerate(tensors)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file, metadata={"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    folder = one_tensor_per_shard(tmp_path / "model", num_hidden_layers=8)
    shards = len(list(folder.glob("*.safetensors")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64) + 40
    assert shards > allowed
    stock = tiny.comparable(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    wanted = stock.generate(tiny.prompt(1, 5), max_new_tokens=6, do_sample=False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        model = offmoe.from_pretrained(folder, slots_per_layer=3)
        with model.offload:
            found = model.generate(tiny.prompt(1, 5), max_new_tokens=6, do_sample=False)
            if os.path.isdir("/proc/self/fd"):
                links = [f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd")]
                kept = [link for link in links if os.path.realpath(link).startswith(str(folder))]
                assert 0 < len(kept) <= MOST_OPEN
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.equal(found, wanted)


def test_inspect_says_how_many_are_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = one_tensor_per_shard(tmp_path / "model", num_hidden_layers=3)
    shards = len(list(folder.glob("*.safetensors")))
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == shards
    assert main(["inspect", str(folder)]) == 0
    assert f"{shards} files, of which at most {MOST_OPEN} are open" in " ".join(capsys.readouterr().out.split())

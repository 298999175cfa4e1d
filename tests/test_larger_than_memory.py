"""A model whose experts are larger than this machine's RAM loads and generates, in a few slots' worth of memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig

EXPERTS, HIDDEN, INTERMEDIATE = 64, 1024, 4096
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 2

RUN = """
import resource, sys
import torch
import offmoe
options = {"slots_per_layer": 2} if len(sys.argv) < 3 else {"device_memory": int(sys.argv[2])}
model = offmoe.from_pretrained(sys.argv[1], device="cpu", **options)
with model.offload:
    ids = torch.arange(5, 11)[None]
    out = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    print(out.shape[1], model.offload.memory().used, model.offload.stats().misses)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def sparse_shard(path, tensors):
    """A shard of bf16 zeros that takes no room on the disk; returns its bytes."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


@pytest.mark.slow
def test_experts_larger_than_memory(tmp_path):
    layers = int(1.1 * psutil.virtual_memory().total / (EXPERTS * EXPERT_BYTES)) + 1
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        dtype=torch.bfloat16,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = MixtralForCausalLM(config).state_dict()
    dense = {k: torch.randn(v.shape).mul(0.02).bfloat16() for k, v in skeleton.items() if "experts" not in k}
    save_file(dense, tmp_path / "dense.safetensors")
    index = dict.fromkeys(dense, "dense.safetensors")
    total = 0
    for layer in range(layers):
        names = [name for name in skeleton if f".{layer}.mlp.experts" in name]
        shard = f"experts-{layer}.safetensors"
        total += sparse_shard(tmp_path / shard, {name: skeleton[name] for name in names})
        index |= dict.fromkeys(names, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert total > psutil.virtual_memory().total

    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    length, planned, misses, peak = map(int, done.stdout.split())
    assert length == 9
    assert misses >= 2 * layers
    libraries = 1 << 30  # torch and transformers themselves, generously
    assert peak < planned + libraries


@pytest.mark.slow
def test_a_dense_part_larger_than_the_budget(tmp_path):
    """2 GB of attention, of which one layer's 42 MB are there at a time."""
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=1024,
        head_dim=256,
        intermediate_size=64,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        dtype=torch.bfloat16,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = MixtralForCausalLM(config).state_dict()
    total = sparse_shard(tmp_path / "model.safetensors", skeleton)
    plan = inspect(tmp_path, OffloadConfig(device="cpu")).plan
    assert plan.smallest_dense > 2_000_000_000 > 5 * plan.smallest

    arguments = [str(tmp_path), str(plan.smallest)]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    length, planned, _, peak = map(int, done.stdout.split())
    assert length == 9
    assert planned <= plan.smallest
    libraries = 1 << 30
    assert peak < planned + libraries < total

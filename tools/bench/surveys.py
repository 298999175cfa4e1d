#!/usr/bin/env python3
"""Measures the whole command `offmoe inspect`: seconds and peak memory, one JSON line per model.

Configurations of real models are inspected as they are. `--headers` creates a checkpoint folder of DeepSeek-V3's shape,
with the headers of all of its 90,000 tensors and no bytes behind them (sparse files), and inspects that. Importing
torch and transformers takes most of the time, then the number of tensors decides.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests" / "data" / "configs"
SHARD_BYTES = 4_300_000_000

Header = dict[str, dict[str, object]]


def tensors(config: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a DeepSeek-V3 checkpoint in bf16."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    queries, latent = config["q_lora_rank"], config["kv_lora_rank"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.q_a_proj.weight", (queries, hidden)
        yield f"{at}.self_attn.q_a_layernorm.weight", (queries,)
        yield f"{at}.self_attn.q_b_proj.weight", (heads * (nope + rope), queries)
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (latent + rope, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", (latent,)
        yield f"{at}.self_attn.kv_b_proj.weight", (heads * (nope + value), latent)
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{at}.mlp.gate.weight", (config["n_routed_experts"], hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
        for expert in range(config["n_routed_experts"]):
            yield from _mlp(f"{at}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
        yield from _mlp(f"{at}.mlp.shared_experts", hidden, shared)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _mlp(name: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.gate_proj.weight", (inner, hidden)
    yield f"{name}.up_proj.weight", (inner, hidden)
    yield f"{name}.down_proj.weight", (hidden, inner)


def write_sparse(folder: Path, config: dict[str, object]) -> int:
    """Write a checkpoint of this configuration that takes no room on the disk. Returns its number of tensors."""
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[tuple[Header, int]] = [({}, 0)]
    for name, shape in tensors({k: v for k, v in config.items() if isinstance(v, int)}):
        header, end = shards[-1]
        if end > SHARD_BYTES:
            header, end = {}, 0
            shards.append((header, end))
        nbytes = 2
        for size in shape:
            nbytes *= size
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + nbytes]}
        shards[-1] = (header, end + nbytes)
    weight_map: dict[str, str] = {}
    for number, (header, nbytes) in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + nbytes)
        weight_map |= dict.fromkeys(header, file)
    index = {"metadata": {"total_size": sum(nbytes for _, nbytes in shards)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(weight_map)


def measure(model: Path) -> dict[str, object]:
    """Run one command in a process. Returns its seconds, its CPU seconds, its peak resident MiB and its output."""
    arguments = ["inspect", str(model), "--json", "--device", "cpu"]
    read, write = os.pipe()
    began = time.perf_counter()
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "offmoe", *arguments],
        {**os.environ, "PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_CLOSE, read)],
    )
    os.close(write)
    with open(read) as out:
        text = out.read()
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - began
    said = json.loads(text.splitlines()[-1]) if text else {}
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": usage.ru_maxrss >> 10,  # KiB on Linux
        "status": os.waitstatus_to_exitcode(status),
        "parameters": said.get("parameters"),
        "dense_parameters": said.get("dense_parameters"),
        "smallest_device_memory": said.get("smallest_device_memory"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=sorted(CONFIGS.glob("*.json")))
    parser.add_argument("--headers", action="store_true", help="also the headers of a whole DeepSeek-V3")
    args = parser.parse_args()
    for path in args.configs:
        print(json.dumps({"model": path.stem, **measure(path)}), flush=True)
    if args.headers:
        config = json.loads((CONFIGS / "deepseek-v3.json").read_text())
        del config["quantization_config"]
        with tempfile.TemporaryDirectory(prefix="offmoe-bench-") as folder:
            count = write_sparse(Path(folder), config)
            print(json.dumps({"model": "deepseek-v3 headers", "tensors": count, **measure(Path(folder))}), flush=True)


if __name__ == "__main__":
    main()

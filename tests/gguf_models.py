"""Tiny models as GGUF files, each with a safetensors checkpoint of exactly the values that the file decodes to.

What llama.cpp's converter does is stated here once more, in its own direction (from transformers' published names and
values to the file's), and shares nothing with offmoe's tables. Names come from the gguf package's own map. A statement
only moves values, so it runs twice: on the weights, and on their numbers, which says where the decoded values of a
quantized tensor go in the safetensors checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import offmoe
from tests import tiny

Tensors = dict[str, torch.Tensor]
Q = gguf.GGMLQuantizationType
HALVES = {2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2)}
HALVES |= {14: (208,), 20: (0,), 23: (0,), 39: ()}
"""By type, the bytes at which a block has a float16."""


def random_blocks(kind: int, shape: tuple[int, ...], seed: int, spread: float = 0.1) -> np.ndarray:
    """Random blocks of a type for a tensor of this shape, with finite scales of this size, as in real files."""
    values, nbytes = gguf.GGML_QUANT_SIZES[Q(kind)]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (int(np.prod(shape)) // values, nbytes), dtype=np.uint8)
    if kind == Q.MXFP4:
        raw[:, 0] = rng.integers(120, 125, len(raw))
    for at in HALVES[kind]:
        scales = (rng.standard_normal(len(raw)) * spread).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(*shape[:-1], -1)


SPREAD = {Q.Q4_K: 0.0008, Q.Q6_K: 0.0002, Q.Q5_K: 0.0004, Q.Q3_K: 0.003, Q.Q2_K: 0.02, Q.IQ4_XS: 0.0001}
"""By type, how large the scales are, so that weights have the size of a model's."""


@dataclass(frozen=True)
class Statement:
    """What llama.cpp's converter does to one family.

    Args:
        arch: general.architecture.
        sizes: of the tiny model, beside `tiny.COMMON` and `tiny.CONFIGS`.
        convert: (tensors by published names, config) -> the tensors that are named and written.
        metadata: writes the keys of the family.
        forward: published names that the gguf package's map does not know -> the converter's own name for them.
    """

    arch: str
    sizes: Mapping[str, Any]
    convert: Callable[[Tensors, Any], Tensors]
    metadata: Callable[[gguf.GGUFWriter, Any], None]
    forward: Mapping[str, str] | None = None


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of the converter."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def stacked(tensors: Tensors, experts: str, merged: str) -> Tensors:
    """Stack `...{experts}.3.w1.weight` of all experts -> `...{merged}.w1.weight`."""
    out: Tensors = {}
    lists: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        before, found, after = name.partition(f".{experts}.")
        if not found:
            out[name] = tensor
            continue
        expert, _, leaf = after.partition(".")
        lists.setdefault(f"{before}.{merged}.{leaf}", {})[int(expert)] = tensor
    return out | {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in lists.items()}


def common(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(7)


def counted(writer: gguf.GGUFWriter, config: Any) -> None:
    """`common`, and the number of experts."""
    common(writer, config)
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)


def heads(writer: gguf.GGUFWriter, dim: int) -> None:
    writer.add_key_length(dim)
    writer.add_value_length(dim)


def _mixtral(tensors: Tensors, config: Any) -> Tensors:
    out = {}
    for name, tensor in stacked(tensors, "block_sparse_moe.experts", "block_sparse_moe.experts").items():
        changed = tensor
        if name.endswith("q_proj.weight"):
            changed = permute(tensor, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            changed = permute(tensor, config.num_key_value_heads)
        out[
            name.replace("block_sparse_moe.experts.w", "feed_forward.experts.w").replace("model.layers.", "layers.")
            if ".experts." in name
            else name
        ] = changed
    return out


def _mixtral_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    counted(writer, config)
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // config.num_attention_heads)


def _qwen(tensors: Tensors, config: Any) -> Tensors:
    return stacked(tensors, "mlp.experts", "mlp.experts")


def _qwen2_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    counted(writer, config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _qwen3_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    counted(writer, config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    heads(writer, config.head_dim)


WIDE = {"hidden_size": 64, "intermediate_size": 96}
STATEMENTS: dict[str, Statement] = {
    "mixtral": Statement("llama", {**WIDE, "intermediate_size": 32}, _mixtral, _mixtral_metadata),
    "qwen2_moe": Statement(
        "qwen2moe",
        {**WIDE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        _qwen,
        _qwen2_metadata,
    ),
    "qwen3_moe": Statement(
        "qwen3moe",
        {**WIDE, "moe_intermediate_size": 32, "head_dim": 16, "mlp_only_layers": [], "norm_topk_prob": True},
        _qwen,
        _qwen3_metadata,
    ),
}
"""By family of `tiny`."""

Kinds = Callable[[str], Any]
"""The type of a matrix by its name in the file."""


def all_of(kind: Any) -> Kinds:
    return lambda name: kind


def q8_0(name: str) -> Any:
    return Q.Q8_0


def q4_k_m(name: str) -> Any:
    """The mixture of llama-quantize's Q4_K_M, roughly: some down projections and the output in Q6_K."""
    layer = name.split(".")[1] if name.startswith("blk.") else ""
    return Q.Q6_K if name == "output.weight" or ("down" in name and layer == "1") else Q.Q4_K


@dataclass(frozen=True)
class Written:
    """A model in both forms.

    Args:
        file: the GGUF file, or the first part.
        dense: the folder of the safetensors checkpoint with the values that the file decodes to.
    """

    file: Path
    dense: Path


def save(
    folder: Path,
    family: str,
    kinds: Kinds = q8_0,
    *,
    more: Callable[[gguf.GGUFWriter], None] | None = None,
    skip: Callable[[str], bool] = lambda name: False,
    parts: int = 0,
    fused: bool = False,
    name: str = "model",
    **overrides: Any,
) -> Written:
    """Write a tiny model twice.

    Args:
        folder: the folder to write to; the file stands in `folder / "gguf"`.
        family: of `STATEMENTS`.
        kinds: the types of matrices; vectors and routers are float32, as the converter writes them.
        more: writes further metadata.
        skip: tensors that are not written.
        parts: tensors per part; 0: one file.
        fused: gate and up of the experts as one tensor.
        name: of the file.
        overrides: of the configuration.
    """
    sizes = {**STATEMENTS[family].sizes, **overrides}
    model = tiny.build(family, torch.bfloat16, **sizes)
    return write(folder, family, model, kinds, more=more, skip=skip, parts=parts, fused=fused, name=name)


def write(
    folder: Path,
    family: str,
    model: tiny.Model,
    kinds: Kinds = q8_0,
    *,
    more: Callable[[gguf.GGUFWriter], None] | None = None,
    skip: Callable[[str], bool] = lambda name: False,
    parts: int = 0,
    fused: bool = False,
    name: str = "model",
    quantize: bool = False,
) -> Written:
    """As `save`, of a model. quantize: quantize its weights, by the gguf package; else blocks are random."""
    how = STATEMENTS[family]
    dense = folder / "dense"
    tiny.save(model, dense, max_shard_size="100GB")
    published = {key: value.float() for key, value in load_file(dense / "model.safetensors").items()}
    flat = torch.cat([tensor.flatten() for tensor in published.values()])
    places: Tensors = {}
    start = 0
    for key, tensor in published.items():
        places[key] = torch.arange(start, start + tensor.numel(), dtype=torch.float64).view(tensor.shape)
        start += tensor.numel()
    values, index = how.convert(published, model.config), how.convert(places, model.config)
    if fused:
        values, index = _fused(values), _fused(index)
    (folder / "gguf").mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(str(folder / "gguf" / f"{name}.gguf"), how.arch, split_max_tensors=parts)
    writer.add_name("tiny")
    how.metadata(writer, model.config)
    for token, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        add(getattr(model.config, f"{token}_token_id"))
    writer.add_pad_token_id(model.config.pad_token_id)
    if more is not None:
        more(writer)
    names = gguf.get_tensor_name_map(arch_of(how.arch), model.config.num_hidden_layers + 1)
    for seed, (key, tensor) in enumerate(values.items()):
        stored = key if key.startswith("blk.") else (how.forward or {}).get(key) or _name(names, key)
        if skip(stored):
            continue
        if tensor.ndim < 2 or "ffn_gate_inp" in stored or "ssm_conv1d" in stored:
            writer.add_tensor(stored, tensor.numpy())
            continue
        kind = kinds(stored)
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Q.BF16  # as llama-quantize falls back to a type whose blocks fit
        if kind in HALVES and (kind in SPREAD or not quantize):
            raw = random_blocks(kind, tuple(tensor.shape), seed, SPREAD.get(kind, 0.004))
        else:
            raw = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
        decoded = gguf.dequantize(raw, kind).astype(np.float32)
        flat[index[key].long().flatten()] = torch.from_numpy(decoded).flatten()
        writer.add_tensor(stored, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _write_dense(dense, published, flat)
    return Written(sorted((folder / "gguf").glob(f"{name}*.gguf"))[0], dense)


DEMO = Path(offmoe.__file__).parent / "demo" / "model"


def vocabulary(writer: gguf.GGUFWriter) -> None:
    """The demo's tokenizer."""
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i == 0 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_add_bos_token(False)


def save_demo(folder: Path, kinds: Kinds = q8_0) -> Written:
    """The demo as a GGUF file with its vocabulary, quantized; the dense checkpoint gets the demo's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    written = write(folder, "mixtral", model, kinds, more=vocabulary, quantize=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, written.dense)
    return written


def arch_of(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _name(names: Any, key: str) -> str:
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert found is not None, f"the gguf package has no name for {key}"
    return str(found)


def _fused(tensors: Tensors) -> Tensors:
    """Gate and up below each other, as `--fuse-gate-up-exps` of the converter writes them."""
    out = {}
    for key, tensor in tensors.items():
        if key.endswith("experts.gate_proj.weight"):
            both = [tensor, tensors[key.replace("gate_proj", "up_proj")]]
            out[f"blk.{key.split('.')[2]}.ffn_gate_up_exps.weight"] = torch.cat(both, 1)
        elif not key.endswith("experts.up_proj.weight"):
            out[key] = tensor
    return out


def _write_dense(folder: Path, published: Tensors, flat: torch.Tensor) -> None:
    """Put the decoded values, in float32, in the place of the model's own."""
    out, start = {}, 0
    for key, tensor in published.items():
        out[key] = flat[start : start + tensor.numel()].view(tensor.shape).clone()
        start += tensor.numel()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))

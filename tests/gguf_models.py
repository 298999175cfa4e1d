"""Tiny models as GGUF files, each with a safetensors checkpoint of exactly the values that the file decodes to.

What llama.cpp's converter does is stated in gguf_statements.py. Names come from the gguf package's own map. A statement
only moves the values of matrices, so it runs twice: on the weights, and on their numbers, which says where the decoded
values of a quantized tensor go in the safetensors checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import offmoe
from tests import families, tiny
from tests.gguf_statements import STATEMENTS, Statement, Tensors

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


Kinds = Callable[[str], Any]
"""The type of a matrix by its name in the file."""
Quantize = Callable[[np.ndarray, Any], np.ndarray]
"""(values float32 [..., cols], type) -> its blocks, uint8 [..., bytes of a row]. The gguf package has no K-quants."""


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


def config(family: str, wide: bool = False, how: Statement | None = None, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of a family. wide: blocks of 256 values fit the experts. how: None: the family's own."""
    how = how or STATEMENTS[family]
    values = {**tiny.COMMON, **tiny.CONFIGS[family]} if family in tiny.CONFIGS else families.CONFIGS[family]
    return AutoConfig.for_model(family, **{**values, **how.sizes, **(how.wide if wide else {}), **overrides})


def save(
    folder: Path,
    family: str,
    kinds: Kinds = q8_0,
    *,
    how: Statement | None = None,
    wide: bool = False,
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
        how: the statement; None: that of the family.
        wide: whether blocks of 256 values fit the experts.
        overrides: of the configuration.
    """
    how = how or STATEMENTS[family]
    model = tiny.random_model(config(family, wide, how, **overrides), torch.bfloat16)
    return write(folder, how, model, kinds, more=more, skip=skip, parts=parts, fused=fused, name=name)


def write(
    folder: Path,
    how: Statement,
    model: tiny.Model,
    kinds: Kinds = q8_0,
    *,
    more: Callable[[gguf.GGUFWriter], None] | None = None,
    skip: Callable[[str], bool] = lambda name: False,
    parts: int = 0,
    fused: bool = False,
    name: str = "model",
    quantize: Quantize | None = None,
) -> Written:
    """As `save`, of a model. quantize: makes the blocks of its weights; None: blocks are random."""
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
        stored = key if key.startswith("blk.") else _name(names, key)
        if skip(stored):
            continue
        if tensor.ndim < 2 or stored.endswith(".bias") or "ffn_gate_inp" in stored or "ssm_conv1d" in stored:
            writer.add_tensor(stored, tensor.numpy())
            continue
        kind = kinds(stored)
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Q.BF16  # as llama-quantize falls back to a type whose blocks fit
        if kind in HALVES and quantize is None:
            raw = random_blocks(kind, tuple(tensor.shape), seed, SPREAD.get(kind, 0.004))
        else:
            raw = (quantize or gguf.quants.quantize)(np.ascontiguousarray(tensor.numpy()), kind)
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


def save_demo(folder: Path, kinds: Kinds = q8_0, quantize: Quantize = gguf.quants.quantize) -> Written:
    """The demo as a GGUF file with its vocabulary, quantized; the dense checkpoint gets the demo's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    written = write(folder, STATEMENTS["mixtral"], model, kinds, more=vocabulary, quantize=quantize)
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

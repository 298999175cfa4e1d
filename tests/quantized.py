"""Tiny checkpoints in every quantized format, each with a dense checkpoint of exactly the values that it decodes to.

The encoders are plain and slow and share nothing with offmoe's decoders. The golden fixtures of tests/quant show that
the decoders read what the formats' own packages write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import tiny

Encoded = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Raw tensors by the ending of their names, and the dense matrix in float32."""
Encoder = Callable[[torch.Tensor], Encoded]

BLOCK = 8


def fp8(weight: torch.Tensor) -> Encoded:
    rows, cols = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (codes.float() * scale[:, None, :, None]).view(rows, cols)
    return {".weight": codes.view(rows, cols), ".weight_scale_inv": scale}, dense


def fp8_rows(weight: torch.Tensor) -> Encoded:
    """FP8 with one scale per row, as vLLM's quantizers write it."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale


def words(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Pack codes along `dim` into int32 words, lowest bits first."""
    codes = codes.movedim(dim, -1).to(torch.int64).unflatten(-1, (-1, 32 // bits))
    out = torch.stack([codes[..., i] << (bits * i) for i in range(32 // bits)]).sum(0)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32).movedim(-1, dim).contiguous()


def integers(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize to integers: codes [out, in] from 0, zeros and scales [out, groups], dense [out, in]."""
    grouped = weight.float().view(len(weight), -1, group)
    if symmetric:
        scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).to(dtype)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low = grouped.amin(-1)
        scale = ((grouped.amax(-1) - low) / (2**bits - 1)).to(dtype)
        zero = (-low / scale).round().clamp(1, 2**bits - 1).to(dtype)
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    dense = ((codes.to(dtype) - zero[..., None]) * scale[..., None]).view_as(weight).float()
    return codes.view_as(weight).long(), zero.long(), scale, dense


def compressed_tensors(bits: int, symmetric: bool) -> Encoder:
    def encode(weight: torch.Tensor) -> Encoded:
        codes, zero, scale, dense = integers(weight, bits, BLOCK, symmetric, torch.bfloat16)
        raw = {
            ".weight_packed": words(codes, bits, 1),
            ".weight_scale": scale,
            ".weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            raw[".weight_zero_point"] = words(zero, bits, 0)
        return raw, dense

    return encode


def gptq(bits: int, ordered: bool) -> Encoder:
    def encode(weight: torch.Tensor) -> Encoded:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
        order = order if ordered else torch.arange(weight.shape[1])
        sorted_codes, zero, scale, sorted_dense = integers(weight[:, order], bits, BLOCK, False, torch.float16)
        back = torch.argsort(order)
        raw = {
            ".qweight": words(sorted_codes[:, back].T, bits, 0),
            ".qzeros": words(zero.T - 1, bits, 1),
            ".scales": scale.T.contiguous(),
            ".g_idx": (back // BLOCK).to(torch.int32),
        }
        return raw, sorted_dense[:, back]

    return encode


def awq(weight: torch.Tensor) -> Encoded:
    codes, zero, scale, dense = integers(weight, 4, BLOCK, False, torch.float16)

    def pack(values: torch.Tensor) -> torch.Tensor:
        return words(values.T.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4, 1)

    return {".qweight": pack(codes), ".qzeros": pack(zero), ".scales": scale.T.contiguous()}, dense


NF4 = (-1.0, -0.7, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0)


def nf4(nested: bool) -> Encoder:
    """bitsandbytes' layout. The file holds the table of values, which therefore need not be bitsandbytes' own."""

    def encode(weight: torch.Tensor) -> Encoded:
        table = torch.tensor(NF4)
        blocks = weight.float().view(-1, 64)
        absmax = blocks.abs().amax(-1)  # [n]
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        raw = {".weight.quant_map": table}
        if nested:
            offset = float(absmax.mean())
            steps = torch.linspace(-1, 1, 256)
            spread = (absmax - offset).abs().max().clamp(min=1e-6).view(1)
            raw[".weight.absmax"] = ((absmax - offset) / spread)[:, None].sub(steps).abs().argmin(1).to(torch.uint8)
            raw |= {".weight.nested_absmax": spread, ".weight.nested_quant_map": steps}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            absmax = steps[raw[".weight.absmax"].long()] * spread + torch.tensor(offset)
        else:
            raw[".weight.absmax"] = absmax
        codes = (blocks / absmax[:, None])[..., None].sub(table).abs().argmin(-1)  # [n, 64]
        dense = (table[codes] * absmax[:, None]).view_as(weight).bfloat16().float()
        octets = codes.view(-1, 2)
        raw[".weight"] = (octets[:, :1] * 16 + octets[:, 1:]).to(torch.uint8)
        described = json.dumps(state).encode()
        raw[".weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(described), dtype=torch.uint8)
        return raw, dense

    return encode


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(weight: torch.Tensor) -> Encoded:
    """MXFP4 of stacked experts [E, in, out]. The codes are random, not those of `weight`."""
    experts, cols, rows = weight.shape
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(121, 126, (experts, rows, cols // 32), dtype=torch.uint8, generator=generator)
    codes = torch.stack((blocks % 16, blocks // 16), -1).flatten(-2).long()
    dense = (FP4[codes] * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).mT.contiguous()
    return {"_blocks": blocks, "_scales": scales}, dense


def ct_config(bits: int, symmetric: bool, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": BLOCK}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**scheme, **weights}}},
    }


FORMATS: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}),
    "fp8-rows": (fp8_rows, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "ct-int4": (compressed_tensors(4, True), ct_config(4, True)),
    "ct-int4-asym": (compressed_tensors(4, False), ct_config(4, False)),
    "ct-int8": (compressed_tensors(8, True), ct_config(8, True)),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": BLOCK, "version": "gemm", "zero_point": True}),
    "gptq": (gptq(4, False), {"quant_method": "gptq", "bits": 4, "group_size": BLOCK, "desc_act": False}),
    "gptq-int8-desc-act": (gptq(8, True), {"quant_method": "gptq", "bits": 8, "group_size": BLOCK, "desc_act": True}),
    "nf4": (nf4(False), {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-nested": (nf4(True), {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
}


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is quantized: matrices of attention and of experts, shared ones included."""
    return (tensor.ndim == 2 and name.endswith("_proj.weight")) or (".experts." in name and tensor.ndim == 2)


def save(
    folder: Path,
    family: str,
    kind: str,
    *,
    which: Callable[[str, torch.Tensor], bool] = is_quantized,
    **overrides: Any,
) -> tuple[Path, Path]:
    """Write a tiny model twice; returns the folders (quantized, dense)."""
    encode, config = FORMATS[kind]
    model = tiny.build(family, torch.bfloat16, **overrides)
    dense = folder / "dense"
    tiny.save(model, dense, max_shard_size="100GB")
    plain = load_file(dense / "model.safetensors")
    quantized: dict[str, torch.Tensor] = {}
    decoded: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        stem = name.removesuffix(".weight")
        fused = kind == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if fused or (kind != "mxfp4" and which(name, tensor)):
            raw, decoded[name] = encode(tensor)
            quantized |= {stem + ending: part.contiguous() for ending, part in raw.items()}
        else:
            quantized[name] = decoded[name] = tensor
    save_file({k: v.contiguous() for k, v in decoded.items()}, dense / "model.safetensors", metadata={"format": "pt"})
    out = folder / "quantized"
    out.mkdir()
    values = json.loads((dense / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    if (dense / "generation_config.json").exists():
        (out / "generation_config.json").write_text((dense / "generation_config.json").read_text())
    shard(out, quantized)
    return out, dense


def shard(folder: Path, tensors: dict[str, torch.Tensor], parts: int = 3) -> None:
    """Write tensors to shards so that the tensors of one weight are mostly in different shards."""
    names = list(tensors)
    index: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        mine = names[part::parts]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)

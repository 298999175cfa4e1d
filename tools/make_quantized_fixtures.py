#!/usr/bin/env python3
"""Write the golden fixtures in tests/data/quantized: matrices that each format's own package quantized and decoded.

offmoe's decoders are not involved. The one argument names the package, which must be importable:

    compressed-tensors       pip install --no-deps compressed-tensors==0.20.0 loguru
    compressed-tensors-old   pip install --no-deps compressed-tensors==0.10.2 (the last version that writes g_idx)
    gptqmodel, awq           sources of gptqmodel==7.7.0 and autoawq==0.2.9 on PYTHONPATH, with their dependencies
    bitsandbytes             pip install --no-deps bitsandbytes==0.50.2

A file holds `CASE/raw/COMPONENT` as in a checkpoint, and `CASE/dense` as the package decodes it. Its metadata names the
package's version and the parameters of each case.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[1] / "tests" / "data" / "quantized"
Case = tuple[dict[str, object], dict[str, torch.Tensor], torch.Tensor]


def weights(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.2


def scales_and_zeros(weight: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every group, for codes from 0: weight [out, groups, n] -> [out, groups] each."""
    low, high = weight.amin(-1), weight.amax(-1)
    if symmetric:
        scale = weight.abs().amax(-1) / (2 ** (bits - 1) - 1)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round()


def compressed_tensors() -> dict[str, Case]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    cases: dict[str, Case] = {}
    for bits, group, symmetric, dtype in (
        (4, 16, True, torch.bfloat16),
        (4, 16, False, torch.float16),
        (4, None, True, torch.float32),
        (4, None, False, torch.bfloat16),
        (8, 32, True, torch.bfloat16),
        (8, 16, False, torch.bfloat16),
    ):
        weight = weights(20, 64, bits + (group or 0))
        scale, zero = scales_and_zeros(weight.view(20, -1, group or 64), bits, symmetric)
        strategy = "channel" if group is None else "group"
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {"weight": weight.to(dtype), "weight_scale": scale.to(dtype)}
        if not symmetric:
            state["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
        raw = PackedQuantizationCompressor.compress(state, scheme)
        dense = PackedQuantizationCompressor.decompress(raw, scheme)["weight"]
        name = f"int{bits}_{strategy}_{'symmetric' if symmetric else 'asymmetric'}_{str(dtype).rpartition('.')[2]}"
        cases[name] = {"bits": bits, "group": group, "symmetric": symmetric, "ordered": False}, raw, dense
    return cases


def compressed_tensors_old() -> dict[str, Case]:
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    weight = weights(16, 64, 5).bfloat16()
    index = torch.randperm(64, generator=torch.Generator().manual_seed(6)) // 16
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=16, actorder="group")
    scale = weight.abs().float().amax(-1, keepdim=True).expand(-1, 4) / 7 * torch.linspace(0.7, 1.3, 4)
    raw = PackedQuantizationCompressor().compress_weight(
        weight.clone(), scale.bfloat16(), args, g_idx=index.to(torch.int32)
    )
    raw |= {"weight_scale": scale.bfloat16(), "weight_g_idx": index.to(torch.int32)}
    codes = quantize(weight, scale.bfloat16(), None, args, dtype=torch.int8, g_idx=index)
    dense = dequantize(codes, scale.bfloat16(), None, args, g_idx=index)
    return {"int4_actorder": ({"bits": 4, "group": 16, "symmetric": True, "ordered": True}, raw, dense)}


def gptqmodel() -> dict[str, Case]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    cases: dict[str, Case] = {}
    for bits, ordered, symmetric, dtype in (
        (4, False, True, torch.float16),
        (4, True, False, torch.float16),
        (8, True, False, torch.bfloat16),
        (8, False, True, torch.float16),
    ):
        out, cols, group = 32, 64, 32
        weight = weights(out, cols, bits)
        index = torch.arange(cols, dtype=torch.int32) // group
        if ordered:
            index = index[torch.randperm(cols, generator=torch.Generator().manual_seed(bits))]
        grouped = torch.stack([weight[:, index == i] for i in range(cols // group)], dim=1)
        scale, zero = scales_and_zeros(grouped, bits, symmetric)
        if not symmetric:
            zero[3, 0] = 0  # format v1 stores it as 15 or 255, borrowing from the neighboring code
        linear = torch.nn.Linear(cols, out, bias=False)
        linear.weight.data = weight
        module = TorchLinear(bits, group, sym=symmetric, desc_act=ordered, in_features=cols, out_features=out)
        module.pack(linear, scale, zero, index)
        module.scales = module.scales.to(dtype)
        module.post_init()
        dense = module.dequantize_weight().T.contiguous()
        raw = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
        name = f"int{bits}{'_desc_act' if ordered else ''}_{'symmetric' if symmetric else 'asymmetric'}"
        parameters = {"bits": bits, "group": group, "ordered": True}
        if not symmetric:
            cases[f"{name}_v2"] = {**parameters, "minus_one": False}, raw, dense
        older = raw["qzeros"] - (0x11111111 if bits == 4 else 0x01010101)  # convert_gptq_v2_to_v1_format_module
        cases[f"{name}_v1"] = {**parameters, "minus_one": True}, {**raw, "qzeros": older}, dense.clone()
    return cases


def awq() -> dict[str, Case]:
    for name in ("awq", "awq.modules", "awq.modules.linear"):  # skips their __init__ files and what those import
        package = types.ModuleType(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed"
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    weight = weights(32, 64, 9)
    scale, zero = scales_and_zeros(weight.view(32, -1, 32), 4, False)
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = weight
    module = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
    raw = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
    dense = dequantize_gemm(raw["qweight"], raw["qzeros"], raw["scales"], 4, 32).T.contiguous()
    return {"gemm": ({"group": 32}, raw, dense)}


def bitsandbytes() -> dict[str, Case]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    cases: dict[str, Case] = {}
    for kind, nested, dtype, shape in (
        ("nf4", False, torch.bfloat16, (16, 64)),
        ("nf4", True, torch.bfloat16, (32, 64)),
        ("fp4", False, torch.float16, (16, 64)),
        ("fp4", True, torch.float32, (6, 70)),
    ):
        weight = weights(*shape, seed=11).to(dtype)
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        raw = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
        cases[f"{kind}{'_nested' if nested else ''}"] = {}, raw, dequantize_4bit(packed, state).contiguous()
    return cases


MAKERS = {
    "compressed-tensors": (compressed_tensors, "compressed-tensors"),
    "compressed-tensors-old": (compressed_tensors_old, "compressed-tensors"),
    "gptqmodel": (gptqmodel, "gptqmodel"),
    "awq": (awq, "autoawq"),
    "bitsandbytes": (bitsandbytes, "bitsandbytes"),
}


def main(name: str) -> None:
    make, distribution = MAKERS[name]
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:  # the package is source files on PYTHONPATH
        version = {"gptqmodel": "7.7.0", "autoawq": "0.2.9"}[distribution]
    tensors, parameters = {}, {}
    for case, (options, raw, dense) in make().items():
        parameters[case] = options
        tensors[f"{case}/dense"] = dense
        tensors |= {f"{case}/raw/{component}": tensor.contiguous().clone() for component, tensor in raw.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    notes = {"made_by": f"{distribution} {version}", "cases": json.dumps(parameters)}
    save_file(tensors, OUT / f"{name}.safetensors", metadata=notes)
    print(f"{name}: {len(parameters)} cases by {notes['made_by']}")


if __name__ == "__main__":
    main(sys.argv[1])

"""Experts in slots for tests of the GPU kernels: every format, the values of its numbers, and where they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import Pairs
from offmoe.compute.kernels.operands import GatedOperands, Operand, coded_operand, float_operand
from offmoe.quant.float_formats import Mxfp4, ScaledFloat
from offmoe.quant.int_formats import PackedInt
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout, aligned

Views = dict[str, torch.Tensor]


class Expert(NamedTuple):
    """The values in an expert's slot as float32: gate and up [I, H], down [H, I], biases or zeros."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | float = 0.0
    up_bias: torch.Tensor | float = 0.0
    down_bias: torch.Tensor | float = 0.0

    def __call__(self, x: torch.Tensor, glu: Glu) -> torch.Tensor:
        """x [n, H] -> [n, H], in float32."""
        x = x.float()
        inner = glu(x @ self.gate.T + self.gate_bias, x @ self.up.T + self.up_bias)
        return inner @ self.down.T + self.down_bias


@dataclass(frozen=True)
class Format:
    """fill(views of a slot): writes random weights into it and gives their values."""

    layout: ExpertLayout
    operands: GatedOperands
    fill: Callable[[Views], Expert]


def stacked(gate_up: Operand, down: Operand, interleaved: bool = False) -> GatedOperands:
    """gate_up [2 I, H]: gate first, or gate and up in turns."""
    half = gate_up.rows // 2
    if interleaved:
        return GatedOperands(gate_up.part(half, 0, 2), gate_up.part(half, 1, 2), down)
    return GatedOperands(gate_up.part(half, 0), gate_up.part(half, half), down)


def floats(dtype: torch.dtype, hidden: int, inner: int, transposed: bool = False) -> Format:
    shapes = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    layout = ExpertLayout.of({n: (dtype, s[::-1] if transposed else s) for n, s in shapes.items()})

    def fill(views: Views) -> Expert:
        for view in views.values():
            view.copy_(torch.randn(view.shape) * 0.05)
        gate_up, down = (v.float().T if transposed else v.float() for v in views.values())
        gate, up = gate_up.chunk(2)
        return Expert(gate, up, down)

    gate_up, down = (float_operand(param, transposed) for param in layout.params)
    return Format(layout, stacked(gate_up, down), fill)


def fp8(block: tuple[int, int] | None, hidden: int, inner: int) -> Format:
    """As DeepSeek-V3 stores it (scales per block, ragged at the ends), or with a scale per row."""
    codec = ScaledFloat(block)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (rows, cols) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
        wanted[name + ".weight"] = torch.float8_e4m3fn, (rows, cols)
        high, wide = block or (1, cols)
        wanted[name + ".scale"] = torch.float32, (-(-rows // high), -(-cols // wide))
    layout = ExpertLayout.of(wanted)
    params = {param.name: param for param in layout.params}

    def fill(views: Views) -> Expert:
        for name, view in views.items():
            is_scale = name.endswith("scale")
            view.copy_(torch.rand(view.shape) * 1e-3 + 2e-4 if is_scale else torch.randn(view.shape) * 60)
        parts = ({c: views[f"{name}.{c}"] for c in ("weight", "scale")} for name in ("gate", "up", "down"))
        return Expert(*(codec.decode(part, torch.float32) for part in parts))

    operands = (
        coded_operand(codec, {c: params[f"{name}.{c}"] for c in ("weight", "scale")}) for name in ("gate", "up", "down")
    )
    return Format(layout, GatedOperands(*operands), fill)


def gpt_oss(hidden: int, inner: int) -> Format:
    """Blocks and scales as gpt-oss stores them, gate and up in turns, with biases."""
    codec = Mxfp4()
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (rows, cols) in {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}.items():
        wanted[name + ".blocks"] = torch.uint8, (rows, cols // 32, 16)
        wanted[name + ".scales"] = torch.uint8, (rows, cols // 32)
        wanted[name + ".bias"] = torch.bfloat16, (rows,)
    layout = ExpertLayout.of(wanted)
    params = {param.name: param for param in layout.params}

    def fill(views: Views) -> Expert:
        found = {}
        for name in ("gate_up", "down"):
            views[name + ".blocks"].random_(0, 256)
            views[name + ".scales"].random_(119, 122)
            views[name + ".bias"].copy_(torch.randn(views[name + ".bias"].shape))
            parts = {c: views[f"{name}.{c}"] for c in ("blocks", "scales")}
            found[name] = codec.decode(parts, torch.float32).T, views[name + ".bias"].float()
        (gate_up, both), (down, down_bias) = found["gate_up"], found["down"]
        return Expert(gate_up[::2], gate_up[1::2], down, both[::2], both[1::2], down_bias)

    gate_up, down = (
        coded_operand(codec, {c: params[f"{n}.{c}"] for c in ("blocks", "scales")}).with_bias(params[f"{n}.bias"])
        for n in ("gate_up", "down")
    )
    return Format(layout, stacked(gate_up, down, interleaved=True), fill)


def compressed_tensors(bits: int, group: int | None, hidden: int, inner: int) -> Format:
    """Integers in rows, as compressed-tensors stores them: words and scales of gate, up and down apart."""
    codec = PackedInt(bits, group)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (rows, cols) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
        wanted[name + ".packed"] = torch.int32, (rows, cols * bits // 32)
        wanted[name + ".scale"] = torch.float16, (rows, cols // group if group else 1)
    layout = ExpertLayout.of(wanted)
    params = {param.name: param for param in layout.params}
    names = ("gate", "up", "down")

    def fill(views: Views) -> Expert:
        for name, view in views.items():
            if name.endswith("packed"):
                view.random_(-(2**31), 2**31 - 1)
            else:
                view.copy_((torch.rand(view.shape) + 0.1) * 2.0 ** (-3 - bits))
        parts = ({c: views[f"{name}.{c}"] for c in ("packed", "scale")} for name in names)
        return Expert(*(codec.decode(part | {"scale": part["scale"].float()}, torch.float32) for part in parts))

    operands = (coded_operand(codec, {c: params[f"{name}.{c}"] for c in ("packed", "scale")}) for name in names)
    return Format(layout, GatedOperands(*operands), fill)


FORMATS: dict[str, Callable[[int, int], Format]] = {
    "bf16": lambda h, i: floats(torch.bfloat16, h, i),
    "fp16-transposed": lambda h, i: floats(torch.float16, h, i, transposed=True),
    "int4-g32": lambda h, i: compressed_tensors(4, 32, h, i),
    "int4-g64": lambda h, i: compressed_tensors(4, 64, h, i),
    "int4-g128": lambda h, i: compressed_tensors(4, 128, h, i),
    "int8": lambda h, i: compressed_tensors(8, None, h, i),
    "mxfp4": gpt_oss,
    "fp8-blocks": lambda h, i: fp8((128, 128), h, i),
    "fp8-rows": lambda h, i: fp8(None, h, i),
}


class Slots(NamedTuple):
    """Memory of some slots, where each begins, and the expert in each."""

    memory: torch.Tensor
    starts: list[int]
    experts: list[Expert]


def fill_slots(form: Format, count: int, seed: int = 0) -> Slots:
    """Slots with gaps between them; reading past the end of a slot gives NaN."""
    torch.manual_seed(seed)
    step = aligned(form.layout.nbytes, PARAM_ALIGNMENT) + PARAM_ALIGNMENT
    whole = torch.full(((count + 1) * step,), 0xFF, dtype=torch.uint8)
    memory = whole[-whole.data_ptr() % PARAM_ALIGNMENT :]
    starts = [PARAM_ALIGNMENT + i * step for i in range(count)]
    experts = [form.fill(form.layout.views(memory[at : at + form.layout.nbytes])) for at in starts]
    return Slots(memory, starts, experts)


def reference(slots: Slots, pairs: Pairs, glu: Glu, hidden: torch.Tensor) -> torch.Tensor:
    """The rows that `DeviceKernels.compute` has to give, in float32."""
    order = torch.zeros(sum(pairs.counts), dtype=torch.int64) if pairs.order is None else pairs.order
    inputs = hidden[order // pairs.sharing].split(list(pairs.counts))
    return torch.cat([slots.experts[slot](x, glu) for slot, x in zip(pairs.slots, inputs, strict=True)])


def interpret_quickly() -> None:
    """Prepare triton.language for the interpreter once, in a process that only interprets.

    The interpreter does it anew for every call of one function by another, which takes 5 ms: most of a test's time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    from offmoe.compute.kernels.triton.elements import lane

    interpreter._patch_lang(lane.fn)
    interpreter._patch_lang(tl.zeros.fn)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()

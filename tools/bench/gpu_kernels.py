"""Checks the Triton kernels on a GPU and measures how close they come to memory speed, per format and against torch.

The weights of the chosen experts are read from the device's memory, which is the limit for few tokens. Every call uses
other experts than the previous one, so that caches do not help. Launches are recorded once and replayed as a CUDA
graph: the time to start a kernel from Python is a question of its own (section resident).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import DECODE_PAIRS, FULL_GRID, DeviceKernels, Pairs, available
from offmoe.compute.kernels.operands import GatedOperands, Operand, coded_operand, float_operand
from offmoe.device.arena import SlotArena
from offmoe.device.select import select_backend
from offmoe.quant.float_formats import Mxfp4, ScaledFloat
from offmoe.quant.int_formats import PackedInt
from offmoe.storage.layout import ExpertLayout
from tools.bench.gpu_section import MIB, Section

SHAPES = {"mixtral": (4096, 14336, 2), "qwen3": (2048, 768, 8)}
"""Hidden and intermediate size, experts per token."""
TINY_SHAPES = {"tiny": (128, 128, 2)}
SMALL, TINY_SMALL = (256, 384, 2), (128, 128, 2)
SLAB_BYTES = 4 * 10**9
TINY_TIMED = ("int4_g64",)
"""Formats that a dry run times: Triton's interpreter takes seconds for each."""
TOKENS, TINY_TOKENS = (1, 2, 4, 8, 16, 64, 512), (1, 2)
ALLOWED = 5e-3
"""Largest relative L2 error against float32 with dequantized weights."""
FORMATS: dict[str, PackedInt | Mxfp4 | ScaledFloat | None] = {
    "bf16": None,
    "int8": PackedInt(8, None),
    "int4_g64": PackedInt(4, 64),
    "mxfp4": Mxfp4(),
    "fp8": ScaledFloat((128, 128)),
}


class Form(NamedTuple):
    layout: ExpertLayout
    operands: GatedOperands


def kernels(section: Section) -> None:
    """Triton's kernels against float32, against the memory's bandwidth, and against torch."""
    forms = {name: form(name, *small(section)) for name in FORMATS}
    section.note(formats=list(forms), expert_bytes={name: weight_bytes(f.operands) for name, f in forms.items()})
    if not available():
        section.skip("everything: Triton is not installed")
        return
    errors = {}
    for name, each in forms.items():
        errors[name] = {str(tokens): error(section, name, each, tokens) for tokens in (1, 40)}
        section.note(errors=errors)
        print(f"  {name:16s} relative error {errors[name]}")
    bandwidth = bandwidth_gb_s(section)
    section.note(memory_gb_s=round(bandwidth, 1), gemlite="not timed: its layers hold their own copy of an expert")
    print(f"  memory {bandwidth:.0f} GB/s, read and written")
    rows: list[dict[str, Any]] = []
    for shape, (hidden, inner, top_k) in (TINY_SHAPES if section.tiny else SHAPES).items():
        for name in TINY_TIMED if section.tiny else FORMATS:
            if section.left() < 5:
                section.skip(f"{name}, {shape}: out of time")
                continue
            rows.append({"shape": shape, "format": name} | timed(section, form(name, hidden, inner), top_k, bandwidth))
            section.note(rows=rows)
            print("  " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    wrong = [name for name, found in errors.items() if max(found.values()) > ALLOWED]
    assert not wrong, f"not within {ALLOWED} of float32: {', '.join(wrong)}"


def small(section: Section) -> tuple[int, int]:
    """Hidden and intermediate size for results, where times do not count."""
    return (TINY_SMALL if section.tiny else SMALL)[:2]


def form(name: str, hidden: int, inner: int) -> Form:
    """How slots hold experts of a format and shape."""
    codec = FORMATS[name]
    shapes = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    if codec is None:
        layout = ExpertLayout.of({part: (torch.bfloat16, shape) for part, shape in shapes.items()})
        return Form(layout, _halves(*map(float_operand, layout.params)))
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for part, (rows, cols) in shapes.items():
        wanted |= {f"{part}.{component}": spec for component, spec in components(codec, rows, cols).items()}
    layout = ExpertLayout.of(wanted)
    params = {param.name: param for param in layout.params}
    operands = (coded_operand(codec, {c: params[f"{part}.{c}"] for c in codec.required}) for part in shapes)
    return Form(layout, _halves(*operands))


def weight_bytes(operands: GatedOperands) -> int:
    """Bytes of an expert's weights, without scales."""
    sizes = {"bf16": 2, "uint8": 1, "int32": 4}
    parts = (operands.gate, operands.up, operands.down)
    return sum(part.rows * part.width * sizes[part.element] for part in parts)


def components(
    codec: PackedInt | Mxfp4 | ScaledFloat, rows: int, cols: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the tensors that a checkpoint stores of a weight."""
    if isinstance(codec, PackedInt):
        groups = cols // codec.group if codec.group else 1
        return {"packed": (torch.int32, (rows, cols * codec.bits // 32)), "scale": (torch.bfloat16, (rows, groups))}
    if isinstance(codec, Mxfp4):
        return {"blocks": (torch.uint8, (rows, cols // 32, 16)), "scales": (torch.uint8, (rows, cols // 32))}
    return {
        "weight": (torch.float8_e4m3fn, (rows, cols)),
        "scale": (torch.float32, (-(-rows // 128), -(-cols // 128))),
    }


def _halves(gate_up: Operand, down: Operand) -> GatedOperands:
    half = gate_up.rows // 2
    return GatedOperands(gate_up.part(half, 0), gate_up.part(half, half), down)


def fill(name: str, views: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Fill a slot with a random expert. Returns its gate_up and down in float32."""
    codec, out = FORMATS[name], []
    for part in ("gate_up", "down"):
        if codec is None:
            out.append((torch.randn(views[part].shape) * 0.05).bfloat16().float())
            views[part].copy_(out[-1])
            continue
        raw = {c: _random(codec, c, views[f"{part}.{c}"]) for c in codec.required}
        for component, values in raw.items():
            views[f"{part}.{component}"].copy_(values)
        weight = codec.decode(raw, torch.float32)
        out.append(weight.T if isinstance(codec, Mxfp4) else weight)
    return out


def _random(codec: PackedInt | Mxfp4 | ScaledFloat, component: str, like: torch.Tensor) -> torch.Tensor:
    """Random values of a component, such that weights are of about 0.05."""
    if component == "packed":
        return torch.randint(-(2**31), 2**31 - 1, like.shape, dtype=torch.int32)
    if component == "blocks":
        return torch.randint(0, 256, like.shape, dtype=torch.uint8)
    if component == "scales":
        return torch.full(like.shape, 120, dtype=torch.uint8)
    if component == "weight":
        return (torch.randn(like.shape) * 60).to(torch.float8_e4m3fn)
    if isinstance(codec, PackedInt):
        return ((torch.rand(like.shape) + 0.1) * 2.0 ** (-3 - codec.bits)).to(like.dtype)
    return torch.rand(like.shape) * 1e-3 + 2e-4


def error(section: Section, name: str, form: Form, tokens: int) -> float:
    """Relative L2 error of two experts on bf16 inputs."""
    arena = SlotArena(select_backend(section.device).allocate, [form.layout] * 2)
    experts = [fill(name, arena.views(slot, form.layout)) for slot in (0, 1)]
    made = DeviceKernels(
        form.operands, Glu(), arena.memory, arena.starts, full_grid=full_grid(section), launch=section.hooks.launch
    )
    x = torch.randn(tokens, form.operands.hidden).to(inputs(section))
    order = None if tokens == 1 else torch.arange(tokens).repeat(2).to(section.device)
    got = made.compute(Pairs([1, 0], [tokens, tokens], order), x.to(section.device)).float().cpu()
    right = []
    for gate_up, down in reversed(experts):
        gate, up = (x.float() @ gate_up.T).chunk(2, dim=-1)
        right.append(Glu()(gate, up) @ down.T)
    return float((got - torch.cat(right)).norm() / torch.cat(right).norm())


def bandwidth_gb_s(section: Section) -> float:
    """GB/s that a copy within the device reads and writes."""
    source = torch.ones((1 if section.tiny else 1024) * MIB, dtype=torch.uint8, device=section.device)
    destination = torch.empty_like(source)
    destination.copy_(source)
    return 2 * source.nbytes / 1e9 / min(section.hooks.seconds(lambda: destination.copy_(source)) for _ in range(5))


def timed(section: Section, form: Form, top_k: int, bandwidth: float) -> dict[str, Any]:
    """Microseconds for every number of tokens; for one token also the share of memory speed, and torch on bf16."""
    most = 2 * top_k if section.tiny else 64
    count = max(2 * top_k, min(most, SLAB_BYTES // form.layout.nbytes)) // top_k * top_k
    arena = SlotArena(select_backend(section.device).allocate, [form.layout] * count)
    arena.memory.random_(0, 56)  # no format has anything but small finite numbers in such bytes
    recorded: list[tuple[Any, ...]] = []
    launch, grid = lambda *given: recorded.append(given), full_grid(section)
    made = DeviceKernels(form.operands, Glu(), arena.memory, arena.starts, full_grid=grid, launch=launch)
    hidden, out = form.operands.hidden, {}
    for tokens in TINY_TOKENS if section.tiny else TOKENS:
        ways = [made.by_pair] if tokens * top_k <= 8 * DECODE_PAIRS else []
        for compute in ways if tokens == 1 else [*ways, made.by_group]:
            recorded.clear()
            x = torch.randn(tokens, hidden, dtype=inputs(section), device=section.device)
            order = torch.arange(tokens * top_k, device=section.device)
            for first in range(0, count, top_k):
                compute(Pairs(range(first, first + top_k), [tokens] * top_k, order, top_k), x)
            calls = count // top_k
            us = graph_s(section, lambda: start(section, recorded)) / calls * 1e6
            out[f"{compute.__name__}_{tokens}_us"] = round(us, 1)
            if tokens == 1:
                out["share_of_memory"] = round(top_k * weight_bytes(form.operands) / us / 1e3 / bandwidth, 3)
    inner = form.operands.inner
    weights = torch.randn(2, 3 * inner * hidden, dtype=torch.bfloat16, device=section.device).unbind()
    x = torch.randn(1, hidden, dtype=torch.bfloat16, device=section.device)

    def by_torch() -> None:
        for weight in weights:
            gate_up, down = weight.split([2 * inner * hidden, inner * hidden])
            gate, up = torch.nn.functional.linear(x, gate_up.view(2 * inner, hidden)).chunk(2, dim=-1)
            torch.nn.functional.linear(Glu()(gate, up), down.view(hidden, inner))

    out["torch_bf16_1_us"] = round(graph_s(section, by_torch) / 2 * top_k * 1e6, 1)
    return out


def full_grid(section: Section) -> int:
    """Programs of a launch at least. Triton's interpreter runs one after the other."""
    return 1 if section.tiny else FULL_GRID


def inputs(section: Section) -> torch.dtype:
    """The dtype of inputs. Triton's interpreter, which the dry run takes, multiplies no bfloat16."""
    return torch.float16 if section.tiny else torch.bfloat16


def start(section: Section, recorded: list[tuple[Any, ...]]) -> None:
    for kernel, grid, given, sizes in recorded:
        section.hooks.launch(kernel, grid, given, sizes)


def graph_s(section: Section, work: Callable[[], object]) -> float:
    """Seconds of `work` without the time to start its kernels; the best of some rounds."""
    work()  # compiles
    replay = section.hooks.repeatable(work)
    replay()
    return min(section.hooks.seconds(replay) for _ in range(1 if section.tiny else 5))

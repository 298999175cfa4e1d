"""The GPU kernels without a GPU: run in Triton's interpreter, compiled for GPUs that are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the GPU kernels need Triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from offmoe.compute import gpu_compute  # noqa: E402
from offmoe.compute.gpu_compute import device_compute  # noqa: E402
from offmoe.compute.kernels import device  # noqa: E402
from offmoe.compute.kernels.cpu import Glu  # noqa: E402
from offmoe.compute.kernels.device import DeviceKernels, Pairs  # noqa: E402
from offmoe.compute.kernels.routed import LayerSizes, RoutedLayer, RoutedState  # noqa: E402
from offmoe.compute.torch_compute import TorchCompute  # noqa: E402
from offmoe.device.arena import SlotArena  # noqa: E402
from offmoe.device.backend import CpuBackend  # noqa: E402
from tests.device_cases import FORMATS  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "file",
    ["interpreted_triton.py", "interpreted_models.py", pytest.param("interpreted_routed.py", marks=pytest.mark.slow)],
)
def test_in_the_interpreter(file: str) -> None:
    """Contract tests, in a process of their own: TRITON_INTERPRET has to be set before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, f"tests/compute/kernels/{file}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout


class NoGpu:
    """What Triton asks its driver before it compiles; a launch would fail."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu(request.param))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def compiled(name: str, hidden: int, inner: int, tokens: int, top_k: int = 8) -> dict[str, str]:
    """PTX of the kernels that so many tokens of a model of this shape take, by kernel: started as on a GPU."""
    form, found = FORMATS[name](hidden, inner), {}

    def launch(kernel: Any, grid: tuple[int, int], given: tuple[object, ...], sizes: Mapping[str, int]) -> None:
        made = kernel.warmup(*given, grid=grid, **sizes)
        assert made.metadata.shared <= 99 * 1024, "more shared memory than a desktop's GPU has"
        found[kernel.__name__] = made.asm["ptx"]

    kernels = DeviceKernels(form.operands, Glu(), torch.zeros(256, dtype=torch.uint8), [0] * top_k, launch=launch)
    order = None if tokens == 1 else torch.arange(tokens * top_k)
    pairs = Pairs(list(range(top_k)), [tokens] * top_k, order, top_k)
    kernels.compute(pairs, torch.zeros(tokens, hidden, dtype=torch.bfloat16))
    return found


def spilled(ptx: str) -> int:
    """Bytes of registers that ptxas stores to memory. The PTX does not tell: it has as many registers as it likes."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = re.search(r"\.target (sm_(\d+)\w*)", ptx)
    assert found is not None
    tool = folder / ("ptxas-blackwell" if int(found[2]) >= 90 else "ptxas")
    if not tool.exists():
        pytest.skip("this Triton has no ptxas")
    command = [str(tool), "-v", f"--gpu-name={found[1]}", "-o", os.devnull, "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, timeout=600)
    stores = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert stores is not None, done.stderr
    return int(stores[1])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("gpu", "name", "hidden", "inner"),
    [
        (80, "bf16", 2048, 768),
        (90, "bf16", 2048, 768),
        (80, "int4-g64", 4096, 14336),
        (90, "int4-g64", 2048, 768),
        (80, "int8", 2048, 768),
        (80, "mxfp4", 2880, 2880),
        (80, "fp8-blocks", 2048, 768),
    ],
    indirect=["gpu"],
)
def test_decoding_reads_16_bytes_at_a_time(name: str, hidden: int, inner: int) -> None:
    found = compiled(name, hidden, inner, tokens=1)
    assert found.keys() == {"gate_up_rows", "down_rows"}
    for kernel, matrices in (("gate_up_rows", 2), ("down_rows", 1)):
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", found[kernel])) >= matrices
        assert ".ftz" not in found[kernel], "subnormals carry the values of FP8 and MXFP4"
        assert "fma.rn.f32" in found[kernel]
        assert spilled(found[kernel]) == 0


def compiled_routed(name: str, rows: int, experts: int = 128, top_k: int = 8) -> dict[str, str]:
    """PTX of the kernels of a layer without the host, by kernel."""
    form, found = FORMATS[name](2048, 768), {}

    def launch(kernel: Any, grid: tuple[int, int], given: tuple[object, ...], options: Mapping[str, Any]) -> None:
        made = kernel.warmup(*given, grid=grid, **options)
        assert made.metadata.shared <= 99 * 1024, "more shared memory than a desktop's GPU has"
        found[kernel.__name__] = made.asm["ptx"]

    memory = torch.zeros(256, dtype=torch.uint8)
    sizes = [LayerSizes(experts, top_k, 2 * top_k, pieces=3)]
    state = RoutedState(sizes, rows, memory.device, lambda n: torch.empty(n, dtype=torch.uint8), entries=64)
    layer = RoutedLayer(0, state, memory, form.operands, Glu(), launch=launch)
    ids = torch.zeros(rows, top_k, dtype=torch.int64)
    layer.assign(ids)
    layer.gather()
    layer.compute(torch.zeros(rows, 2048, dtype=torch.bfloat16), ids, torch.zeros(rows, top_k))
    return found


ROUTED = {"assign", "gather", "gate_up_rows", "down_reduced"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("gpu", "name"), [(80, "int4-g64"), (89, "bf16"), (90, "int4-g64"), (120, "bf16")], indirect=["gpu"]
)
def test_layers_without_the_host_spill_nothing(name: str) -> None:
    found = compiled_routed(name, rows=1)
    assert {kernel: spilled(ptx) for kernel, ptx in found.items()} == dict.fromkeys(ROUTED, 0)
    published = re.search(r"atom\.\S*exch\S*", found["assign"])
    assert published is not None
    assert {"release", "sys"} <= set(published[0].split(".")), "the host sees whole entries"
    assert found["assign"].rfind("bar.sync", 0, published.start()) > 0, "of all threads"


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gpu", [80, 86, 89, 90, 120], indirect=True)
def test_layers_without_the_host_spill_nothing_anywhere(name: str, rows: int) -> None:
    found = compiled_routed(name, rows, experts=512 if rows == 1 else 128)
    assert {kernel: spilled(ptx) for kernel, ptx in found.items()} == dict.fromkeys(ROUTED, 0)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("gpu", "name", "tokens"),
    [(80, "bf16", 64), (90, "bf16", 64), (80, "int4-g64", 64), (90, "int4-g64", 16)],
    indirect=["gpu"],
)
def test_products_run_on_tensor_cores(name: str, tokens: int) -> None:
    found = compiled(name, 2048, 768, tokens)
    assert found.keys() == {"gate_up_blocks", "down_blocks"}
    assert all(re.search(r"mma\.sync|wgmma\.mma_async", ptx) for ptx in found.values())


CAPABILITIES = (75, 80, 86, 89, 90, 120)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gpu", CAPABILITIES, indirect=True)
def test_decode_kernels_spill_nothing(name: str) -> None:
    """D12: on every generation, in every format."""
    assert {kernel: spilled(ptx) for kernel, ptx in compiled(name, 2048, 768, tokens=1).items()} == {
        "gate_up_rows": 0,
        "down_rows": 0,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("tokens", [16, 32, 64])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gpu", CAPABILITIES[1:], indirect=True)
def test_grouped_kernels_spill_nothing(name: str, tokens: int) -> None:
    """sm_75 has no bf16 on its tensor cores; what stands in for it spills."""
    assert {kernel: spilled(ptx) for kernel, ptx in compiled(name, 2048, 768, tokens).items()} == {
        "gate_up_blocks": 0,
        "down_blocks": 0,
    }


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("gpu", [86], indirect=True)
def test_int8_of_many_tokens_spills_nothing() -> None:
    """It was 236 bytes, with blocks of 64 rows."""
    assert set(map(spilled, compiled("int8", 2048, 768, tokens=64).values())) == {0}


def test_every_variant_is_compiled_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """D10: whatever a generation launches later has been compiled. No compiler runs here: variants are noted."""
    form, top_k = FORMATS["int4-g64"](256, 128), 4
    seen: set[tuple[str, object, object, object]] = set()

    def noted(kernel: Any, grid: tuple[int, int], given: tuple[object, ...], sizes: Mapping[str, int]) -> None:
        options = tuple(value for value in given if isinstance(value, int))
        seen.add((kernel.__name__, options, tuple(type(value).__name__ for value in given), tuple(sizes.items())))

    class Kernel:
        """A kernel as Triton sees one, which can be compiled and not launched."""

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def warmup(self, *given: object, grid: tuple[int, int], **sizes: int) -> None:
            noted(self, grid, given, sizes)

    kernels = DeviceKernels(form.operands, Glu(), torch.zeros(256, dtype=torch.uint8), [0] * 32)
    for module, names in (
        (kernels._decode, "gate_up_rows down_rows"),
        (kernels._grouped, "gate_up_blocks down_blocks"),
    ):
        for name in names.split():
            monkeypatch.setattr(module, name, Kernel(name))
    count = kernels.compile(torch.bfloat16, top_k)
    compiled_at_load = set(seen)
    assert count >= len({(name, sizes) for name, _, _, sizes in seen}) > 4
    seen.clear()
    monkeypatch.setattr(kernels, "_launch", noted)
    one = torch.zeros(1, 256, dtype=torch.bfloat16)
    kernels.compute(Pairs([1, 2, 3, 5], [1] * top_k), one)
    for counts in ([1, 2], [3, 1, 4], [8, 8], [1] * 17, [9, 9], [40, 3], [300, 200, 1]):
        tokens = torch.zeros(max(counts), 256, dtype=torch.bfloat16)
        kernels.compute(Pairs(list(range(len(counts))), counts, torch.arange(sum(counts)), top_k), tokens)
    assert seen
    assert seen <= compiled_at_load


def test_slots_that_32_bits_do_not_reach_are_refused() -> None:
    """Places are counted in 256 bytes."""
    operands, memory = FORMATS["bf16"](64, 64).operands, torch.zeros(256, dtype=torch.uint8)
    DeviceKernels(operands, Glu(), memory, [0, (1 << 39) - 256])
    with pytest.raises(OverflowError, match="512 GiB"):
        DeviceKernels(operands, Glu(), memory, [0, 1 << 39])


def test_kernels_that_do_not_compile_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels: Any = {0: DeviceKernels(FORMATS["bf16"](64, 64).operands, Glu(), torch.zeros(256, dtype=torch.uint8), [0])}

    def fails(*_: object) -> int:
        raise RuntimeError("no assembler for sm_999\nwith a long explanation")

    monkeypatch.setattr(DeviceKernels, "compile", fails)
    reasons = Counter[str]()
    gpu_compute._compile(kernels, torch.bfloat16, (2,), reasons)
    assert not kernels
    assert reasons == {"the GPU kernels do not compile here (no assembler for sm_999)": 1}


def test_without_triton_torch_computes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    arena = SlotArena(CpuBackend().allocate, [])
    otherwise = TorchCompute(arena, torch.float32)
    assert device_compute([], arena, otherwise) is otherwise
    assert "Triton is not installed" in caplog.text
    assert "install Triton" in caplog.text

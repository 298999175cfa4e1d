"""The contract of the GPU kernels, on a CPU, in Triton's interpreter: fp32 with dequantized weights is right.

test_triton.py runs this file in a process of its own with TRITON_INTERPRET=1, which has to be set before Triton is
imported. Inputs are float16 and float32: the interpreter multiplies bfloat16 matrices as if they were integers.
"""

from __future__ import annotations

import pytest
import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import DECODE_PAIRS, DeviceKernels, Pairs
from tests.device_cases import FORMATS, Slots, fill_slots, interpret_quickly, reference

DEFAULT = Glu()
ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3}
"""Relative L2 by the inputs' dtype. With float16 inputs, dequantized weights are rounded to float16 too."""


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> None:
    interpret_quickly()


def kernels(name: str, glu: Glu, hidden: int, inner: int) -> tuple[DeviceKernels, Slots]:
    form = FORMATS[name](hidden, inner)
    slots = fill_slots(form, 3)
    return DeviceKernels(form.operands, glu, slots.memory, slots.starts, full_grid=1), slots


def check(name: str, x: torch.Tensor, pairs: Pairs, inner: int, glu: Glu = DEFAULT, *, grouped: bool = False) -> None:
    made, slots = kernels(name, glu, x.shape[1], inner)
    got = made.by_group(pairs, x) if grouped else made.by_pair(pairs, x)
    right = reference(slots, pairs, glu, x)
    assert got.dtype == x.dtype
    assert ((got.float() - right).norm() / right.norm()).item() < ALLOWED[x.dtype]
    for a, b in zip(got.float(), right, strict=True):  # a wrong one must not hide among many
        assert ((a - b).norm() / b.norm()).item() < 2 * ALLOWED[x.dtype]


def size(name: str) -> int:
    """The smallest that has more than one group in a row, or a group."""
    return 128 if name.endswith("128") else 64


@pytest.mark.parametrize("name", FORMATS)
class TestEveryFormat:
    def test_one_token(self, name: str) -> None:
        check(name, torch.randn(1, size(name)), Pairs([2, 0], [1, 1]), size(name))

    def test_many_tokens(self, name: str) -> None:
        order = torch.tensor([5, 0, 8, 2, 3, 11, 7])
        check(name, torch.randn(6, size(name)).half(), Pairs([1, 2], [3, 4], order, 2), size(name), grouped=True)


@pytest.mark.parametrize("grouped", [False, True], ids=["pairs", "groups"])
class TestEveryKernel:
    @pytest.mark.parametrize("name", ["fp8-blocks", "int4-g32", "mxfp4", "bf16"])
    def test_sizes_that_are_no_whole_blocks(self, grouped: bool, name: str) -> None:
        pairs = Pairs([0, 2], [1, 1], torch.tensor([1, 0]))
        check(name, torch.randn(2, 160), pairs, 96, grouped=grouped)

    @pytest.mark.parametrize("glu", [Glu("gelu_tanh"), Glu("clamped", limit=1.0)], ids=["gelu_tanh", "clamped"])
    def test_activations(self, grouped: bool, glu: Glu) -> None:
        for name in ("mxfp4", "bf16"):  # with biases, and without
            pairs = Pairs([0, 1], [1, 1], torch.tensor([1, 0]))
            check(name, 3 * torch.randn(2, 64), pairs, 64, glu, grouped=grouped)

    def test_what_is_not_a_number_is_not_hidden(self, grouped: bool) -> None:
        for name, glu in (("int4-g64", Glu()), ("mxfp4", Glu("clamped", limit=1.0))):
            made, _ = kernels(name, glu, 64, 64)
            x, pairs = torch.randn(3, 64), Pairs([0, 2], [2, 1], torch.tensor([0, 1, 2]))
            x[1, 33] = float("nan")
            rows = made.by_group(pairs, x) if grouped else made.by_pair(pairs, x)
            assert torch.isfinite(rows).all(dim=1).tolist() == [True, False, True]


def test_more_tokens_of_one_expert_than_a_block() -> None:
    pairs = Pairs([0, 1], [70, 20], torch.randperm(90))
    check("bf16", torch.randn(90, 64), pairs, 64, grouped=True)


def test_which_kernel_is_a_question_of_the_number_of_pairs() -> None:
    started: list[str] = []
    form = FORMATS["int8"](64, 64)
    slots = fill_slots(form, 1)
    made = DeviceKernels(
        *(form.operands, Glu(), slots.memory, slots.starts),
        launch=lambda kernel, grid, given, sizes: started.append(kernel.__name__),
    )
    for n in (0, 1, DECODE_PAIRS, DECODE_PAIRS + 1):
        assert made.compute(Pairs([0], [n], torch.arange(n)), torch.zeros(n, 64)).shape == (n, 64)
    many = DECODE_PAIRS + 1
    made.compute(Pairs([0] * many, [1] * many), torch.zeros(1, 64))  # nothing to multiply a matrix with
    assert started == ["gate_up_rows", "down_rows"] * 2 + ["gate_up_blocks", "down_blocks"] + [
        "gate_up_rows",
        "down_rows",
    ]

"""An expert in two calls has the bits that it has in one."""

from __future__ import annotations

import pytest
import torch

from offmoe.compute.kernels.cpu import CpuKernels, GatedExpert, Glu, PreparedExpert
from offmoe.compute.kernels.expert_halves import ExpertHalves
from offmoe.quant.packed_weight import INT8, MXFP4, fp8, int4
from tests.compute.kernels.test_cpu import inputs, random_expert, random_weight
from tests.native import VARIANTS, library_with

FORMATS = [int4(), int4(32), int4(32, zero_points=True), INT8, MXFP4, fp8(64), None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("int8_activations", [False, True])
def test_two_calls_are_one(variant: str, int8_activations: bool) -> None:
    experts = [random_expert(how, 256, inner) for how in FORMATS for inner in (256, 1280)]
    biases = [torch.linspace(-1, 1, rows) for rows in (512, 512, 256)]
    experts += [
        GatedExpert(e.gate, e.up, e.down, *biases) for e in (random_expert(how, 256, 512) for how in (int4(), None))
    ]
    gate, up = (random_weight(int4(32), 384, 256, seed) for seed in (1, 2))
    experts.append(GatedExpert(gate, up, random_weight(INT8, 256, 384)))
    with CpuKernels(library_with(variant), 2, variant, int8_activations=int8_activations) as kernels:
        halves = ExpertHalves(kernels)
        for weights in experts:
            for glu in (Glu(), Glu("gelu_tanh"), Glu("clamped", 1.0)):
                prepared = PreparedExpert(weights, glu)
                x = inputs(1, prepared.hidden)
                h = halves.first(prepared, x)
                assert torch.equal(halves.second(prepared, h), kernels.experts([prepared], x))

"""An expert in two calls has the bits that it has in one."""

from __future__ import annotations

import pytest
import torch

from offmoe.compute.kernels.cpu import CpuKernels, GatedExpert, Glu, PreparedExpert
from offmoe.compute.kernels.expert_halves import ExpertHalves
from offmoe.quant.packed_weight import INT8, MXFP4, int4
from tests.compute.kernels.test_cpu import inputs, random_expert, random_weight
from tests.native import VARIANTS, library_with

FORMATS = [int4(), int4(32), int4(32, zero_points=True), INT8, MXFP4, None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("int8_activations", [False, True])
def test_two_calls_are_one(variant: str, int8_activations: bool) -> None:
    experts = [random_expert(how, hidden, inner) for how in FORMATS for hidden, inner in ((128, 128), (256, 1152))]
    gate, up = (random_weight(int4(32), 384, 256, seed) for seed in (1, 2))
    experts.append(GatedExpert(gate, up, random_weight(INT8, 256, 384)))
    with CpuKernels(library_with(variant), 2, variant, int8_activations=int8_activations) as kernels:
        halves = ExpertHalves(kernels)
        for weights in experts:
            prepared = PreparedExpert(weights, Glu())
            x = inputs(1, prepared.hidden)
            h = halves.first(prepared, x)
            assert torch.equal(halves.second(prepared, h), kernels.experts([prepared], x))

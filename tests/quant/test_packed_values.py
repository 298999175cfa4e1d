"""What packed weights decode to, against the definition of tests/packed.py."""

from __future__ import annotations

import pytest
import torch

from offmoe.quant import packed_values
from offmoe.quant.kernel_words import GGUF_FORMATS
from offmoe.quant.packed_weight import INT8, MXFP4, WeightFormat, fp8, int4
from tests import packed
from tests.quant.test_packed_weight import random_weight

FORMATS = {
    str((how.kind, how.group, how.zero_points, how.scale_dtype, how.minima)): how
    for how in (INT8, int4(32), int4(64, zero_points=True), MXFP4, fp8(128), *GGUF_FORMATS.values())
}


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS.keys())
def test_values_are_those_of_the_definition(how: WeightFormat) -> None:
    weight = random_weight(how, 32, 2 * max(256, how.multiple))
    expected = packed.values(weight)
    for form in (weight, weight.tiled()):
        found = packed_values.values(form)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert weight.nbytes == how.nbytes(weight.rows, weight.cols)

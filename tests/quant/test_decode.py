"""One expert decoded: what stands in the caller's memory."""

from __future__ import annotations

import torch

from offmoe.compute.kernels.gguf import GgufDecoder
from offmoe.quant.decode import ExpertDecoding, Leaf
from offmoe.quant.gguf_formats import GgufBlocks
from offmoe.storage.layout import Assembly, Destination, ExpertLayout
from tests import native
from tests.compute.test_cpu_slot import Allocations
from tests.quant.test_gguf_formats import random_blocks


@native.installed
def test_gates_in_turn_are_decoded_without_new_memory() -> None:
    """As gpt-oss has them: rows of gate and up become columns in turn, while the decoder writes rows."""
    shapes = {"gate": (4, 64), "up": (4, 64), "down": (64, 32)}
    blocks = ExpertLayout.of({name: (torch.uint8, (rows, cols // 32 * 34)) for name, (rows, cols) in shapes.items()})
    leaves = tuple(Leaf(GgufBlocks(8), {"blocks": name}, shape) for name, shape in shapes.items())
    turns = (Destination("gate_up", 0, i, transposed=True, step=2) for i in range(2))
    assembly = Assembly((*turns, Destination("down", 0, 0, transposed=True)))
    decode = ExpertDecoding(leaves, assembly, {"gate_up": (64, 8), "down": (32, 64)})
    views = blocks.views(torch.zeros(blocks.nbytes, dtype=torch.uint8))
    for seed, view in enumerate(views.values()):
        view.copy_(random_blocks(8, len(view), view.shape[1] // 34, seed))
    memory = torch.full((decode.memory_bytes(torch.bfloat16),), 255, dtype=torch.uint8)
    decoder = GgufDecoder(native.library(), 1)
    with Allocations() as allocations:
        found = decode(views, torch.bfloat16, decoder, memory)
    decoder.close()
    assert allocations.nbytes == 0
    assert {tensor.untyped_storage().data_ptr() for tensor in found.values()} == {memory.data_ptr()}
    wanted = decode(views, torch.bfloat16)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

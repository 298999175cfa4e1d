"""Experts computed by torch's operators, in the order of stock transformers: the bitwise compute.

Moves: quantized weights are decoded at every call: by torch into new memory, in C into memory that is kept.
Bound: the device's memory bandwidth for few tokens, arithmetic for many.
Must never: give an expert that is still arriving other bits than a complete one.
"""

from __future__ import annotations

import threading

import torch

from offmoe.compute.compute import ExpertCompute
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.gguf import GgufDecoder
from offmoe.compute.kernels.torch_ffn import GatedFFN, autocast_enabled, expert_ffn
from offmoe.device.arena import SlotArena
from offmoe.storage.layout import PARAM_ALIGNMENT
from offmoe.transfer.engine import TransferEngine


class TorchCompute(ExpertCompute):
    """torch's operators on decoded weights."""

    def __init__(self, arena: SlotArena, dtype: torch.dtype, decoder: GgufDecoder | None = None) -> None:
        """Compute from the slots of an arena.

        Args:
            arena: the slots.
            dtype: the model's. Weights keep it under torch.autocast, where inputs may have another one.
            decoder: decodes GGUF weights of slots in RAM; closed with this.
        """
        self._arena, self.dtype, self._decoder = arena, dtype, decoder
        self._decoded = _KeptMemory()
        self._calling = threading.Lock()
        """Held while decoded weights stand in the kept memory."""
        self._same_by_blocks: dict[tuple[object, ...], bool] = {}
        """Per shapes, dtype and number of threads: whether blocks of rows gave the bits of the whole product."""

    def expert(self, layer: ExpertLayer, slot: int, x: torch.Tensor) -> torch.Tensor:
        weights = self._arena.views(slot, layer.layout)
        dtype = self.dtype if autocast_enabled(x) else x.dtype
        if layer.decode is None:
            return expert_ffn(layer.math, weights, x, dtype)
        if self._decoder is None:
            return expert_ffn(layer.math, layer.decode(weights, dtype), x, dtype)
        with self._calling:
            memory = self._decoded.of(layer.decode.memory_bytes(dtype))
            return expert_ffn(layer.math, layer.decode(weights, dtype, self._decoder, memory), x, dtype)

    def _when_ready(self, layer: ExpertLayer, slot: int, x: torch.Tensor, transfer: TransferEngine) -> torch.Tensor:
        """As `expert`. For a single token, block by block while the expert arrives, if that gives the same bits.

        The first expert of a kind is computed both ways, and its bits decide for all later ones.
        """
        math, arriving = layer.math, transfer.arriving(slot) if len(x) == 1 else None
        if arriving is None or not _divides(layer, x):
            return super()._when_ready(layer, slot, x, transfer)
        assert isinstance(math, GatedFFN)
        weights = self._arena.views(slot, layer.layout)
        kind = (weights[math.up].shape, weights[math.down].shape, x.dtype, torch.get_num_threads())
        if not self._same_by_blocks.get(kind, True) or any(w.dtype != x.dtype for w in weights.values()):
            return super()._when_ready(layer, slot, x, transfer)
        rows = math.as_it_arrives(weights, x, arriving.wait)
        transfer.ready(slot)  # raises if the fetch failed: the rows are wrong then
        if kind in self._same_by_blocks:
            return rows
        whole = math(weights, x)
        self._same_by_blocks[kind] = torch.equal(rows, whole)
        return whole

    def slots_moved(self) -> None:
        """Nothing to note: the arena is asked for a slot each time."""

    def close(self) -> None:
        """End the decoder's threads; torch's are the process's."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoded = _KeptMemory()


class _KeptMemory:
    """RAM for one decoded expert, as large as the largest so far.

    With new memory for every expert, page faults took most of the time: Q4_K was decoded at 2.1 instead of 3.6 GB/s
    (Qwen3-30B-A3B), and at 0.28 instead of 1.8 (Mixtral, whose matrices malloc maps and unmaps each time).
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], aligned to PARAM_ALIGNMENT; the same memory at every call."""
        if len(self._memory) < nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old memory goes before the new one comes
            memory = torch.empty(nbytes + PARAM_ALIGNMENT, dtype=torch.uint8)
            self._memory = memory[-memory.data_ptr() % PARAM_ALIGNMENT :][:nbytes]
        return self._memory[:nbytes]


def _divides(layer: ExpertLayer, x: torch.Tensor) -> bool:
    """Whether an expert's products of one token can be computed by blocks of rows."""
    math = layer.math
    is_plain = isinstance(math, GatedFFN) and not math.transposed and layer.decode is None
    return is_plain and not autocast_enabled(x)

"""The parts of a runtime with pinned RAM, put together without a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from offmoe.compute.compute import ExpertCompute
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.gpu_compute import GpuCompute
from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import DeviceKernels
from offmoe.compute.kernels.torch_ffn import GatedFFN
from offmoe.config import CacheOptions
from offmoe.device.arena import SlotArena
from offmoe.device.backend import CpuBackend
from offmoe.policy.planner import build_planner
from offmoe.runtime.executor import ExpertExecutor
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertRecord
from offmoe.storage.store import ExpertStore
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.types import CacheShape, CacheStats, ExpertKey
from tests.device_cases import floats

EXPERTS, TOP_K, HIDDEN, INNER = 16, 8, 32, 32


class Pinned(CpuBackend):
    """RAM as if it were a device's, with RAM slots that are pinned."""

    unified_memory = False

    def pin(self, address: int, nbytes: int) -> bool:
        return True


class Parts:
    """The parts of a runtime for `layers` layers, of which the first has experts on disk."""

    def __init__(self, folder: Path, layers: int = 1, host_slots: int = 0) -> None:
        form = floats(torch.bfloat16, HIDDEN, INNER)
        shapes = {"gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}
        tensors = {f"{e}.{name}": torch.rand(s).bfloat16() for e in range(EXPERTS) for name, s in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        checkpoint, self.backend = Checkpoint.open(folder), Pinned()
        segments = [tuple(checkpoint.segment(f"{e}.{name}") for name in shapes) for e in range(EXPERTS)]
        self.store = ExpertStore(
            checkpoint.shards, {ExpertKey(0, e): ExpertRecord(each) for e, each in enumerate(segments)}
        )
        shape = CacheShape((EXPERTS,) * layers, (TOP_K,) * layers, (form.layout.nbytes,) * layers)
        self.planner = build_planner(CacheOptions(slots_per_layer=EXPERTS), shape)
        self.arena = SlotArena(self.backend.allocate, [form.layout] * self.planner.num_slots)
        assembly = Assembly((Destination("gate_up", 0, 0), Destination("down", 0, 0)))
        math = GatedFFN("gate_up", torch.nn.functional.silu)
        self.layers = [ExpertLayer(i, form.layout, assembly, math) for i in range(layers)]
        writer = SlotWriter(self.store, self.arena, self.backend, self.layers)
        self.engine = TransferEngine(writer, host_slots=host_slots)
        self.stats = CacheStats.for_layers(layers)

    def executor(self, compute: ExpertCompute | None = None) -> ExpertExecutor:
        """The executor. compute: None: the GPU kernels, whose launches return at once."""
        operands = floats(torch.bfloat16, HIDDEN, INNER).operands
        kernels = DeviceKernels(
            operands, Glu(), self.arena.memory, self.arena.starts, launch=lambda *_: None, upload=torch.from_numpy
        )
        compute = compute or GpuCompute({0: kernels}, self.arena)
        return ExpertExecutor(self.planner, self.engine, compute, self.backend, self.stats)

    def close(self) -> None:
        self.engine.close()
        self.store.close()

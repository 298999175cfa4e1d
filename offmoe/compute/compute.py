"""What computes the experts of a model where they stand in slots; chosen once, when the model is loaded.

What moves: nothing between memories; weights of the experts asked for are read in their slots. Bound: the device's
memory for few tokens, arithmetic for many. `TorchCompute` is the bitwise one, `KernelCompute` the C kernels' on a CPU,
`DeviceCompute` the GPU kernels'.
A compute object that takes all resident experts of a layer in one launch overrides `wave`.

What it must never do: read a slot before `ready` was called for it, or, if it is to be bitwise, let an output depend on
what else was computed in the same wave.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from offmoe.compute.cpu_slot import CpuSlot
from offmoe.compute.gpu_slot import gpu_slot
from offmoe.compute.kernels import ExpertMath, GatedFFN, expert_ffn
from offmoe.compute.kernels.autocast import autocast_enabled
from offmoe.compute.kernels.cpu import CpuKernels, Rows, cpu_kernels, physical_cores
from offmoe.compute.kernels.device import DeviceKernels, Pairs, available
from offmoe.device.arena import SlotArena
from offmoe.errors import OffmoeError, UnsupportedModelError
from offmoe.quant.decode import ExpertDecoding
from offmoe.storage.layout import ExpertLayout
from offmoe.transfer.arrival import Arriving

logger = logging.getLogger(__name__)


class Work(NamedTuple):
    """What the experts of one layer get. hidden: [T, H], or [T * k, H] an input for each (token, expert) pair.

    pairs: per expert, the positions of its pairs in the flattened [T * k]; None: one token, the input of them all.
    sharing: pairs that have one input.
    """

    hidden: torch.Tensor
    pairs: Mapping[int, torch.Tensor] | None
    sharing: int

    def inputs(self, expert: int) -> torch.Tensor:
        """x [n, H] of one expert."""
        return self.hidden if self.pairs is None else self.hidden[self.pairs[expert] // self.sharing]


class Slots(Protocol):
    """What fills slots, as whoever computes sees it."""

    def ready(self, slot: int) -> None:
        """Wait for what is to be in a slot."""

    def arriving(self, slot: int) -> Arriving | None:
        """What is on its way there and may be computed with as it comes, before `ready`; None: nothing."""


class ExpertCompute(ABC):
    """Computes experts of all layers of one model; one thread at a time."""

    @abstractmethod
    def expert(self, layer: int, slot: int, math: ExpertMath, x: torch.Tensor) -> torch.Tensor:
        """The expert of `layer` that stands in `slot` on its tokens: x [n, H] -> [n, H]."""

    def wave(
        self,
        layer: int,
        math: ExpertMath,
        experts: Sequence[tuple[int, int]],
        work: Work,
        slots: Slots,
    ) -> Iterator[torch.Tensor]:
        """Rows [n, H] of each of `experts` ((expert, slot)), in their order.

        Of the dtype of hidden; for one token it may be a wider one, since whoever puts the rows together casts them.
        Under torch.autocast they have the dtype that the math gives.
        A slot may be given to another expert as soon as the next rows are asked for.
        """
        for expert, slot in experts:
            yield self._awaited(layer, slot, math, work.inputs(expert), slots)

    def _awaited(self, layer: int, slot: int, math: ExpertMath, x: torch.Tensor, slots: Slots) -> torch.Tensor:
        """As `expert`, of one that may still be on its way into its slot."""
        slots.ready(slot)
        return self.expert(layer, slot, math, x)

    @abstractmethod
    def close(self) -> None:
        """End the threads that it has, once no call is under way; idempotent. Nothing is computed afterwards."""


class TorchCompute(ExpertCompute):
    """torch's operators, in the order of stock transformers; quantized weights are decoded first, at every call."""

    def __init__(
        self,
        arena: SlotArena,
        layouts: Sequence[ExpertLayout],
        decodings: Sequence[ExpertDecoding | None],
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the model. Under torch.autocast inputs may have another one; weights keep the model's then."""
        self._dtype = dtype
        self._arena, self._layouts, self._decodings = arena, layouts, decodings
        self._same_by_rows: dict[tuple[object, ...], bool] = {}
        """Whether computing by blocks of rows gives the bits of the whole, by what torch goes by."""

    def _awaited(self, layer: int, slot: int, math: ExpertMath, x: torch.Tensor, slots: Slots) -> torch.Tensor:
        divides = isinstance(math, GatedFFN) and not math.transposed and self._decodings[layer] is None
        autocast = autocast_enabled(x)
        arriving = slots.arriving(slot) if divides and len(x) == 1 and not autocast else None
        if arriving is None:
            return super()._awaited(layer, slot, math, x, slots)
        assert isinstance(math, GatedFFN)
        weights = self._arena.views(slot, self._layouts[layer])
        kind = (weights[math.up].shape, weights[math.down].shape, x.dtype, torch.get_num_threads())
        if not self._same_by_rows.get(kind, True) or any(w.dtype != x.dtype for w in weights.values()):
            return super()._awaited(layer, slot, math, x, slots)
        rows = math.as_it_arrives(weights, x, arriving.wait)
        slots.ready(slot)  # which raises what went wrong with what has been computed with
        if kind not in self._same_by_rows:  # the first of its kind: is it what the whole gives?
            whole = math(weights, x)
            self._same_by_rows[kind] = torch.equal(rows, whole)
            return whole
        return rows

    def expert(self, layer: int, slot: int, math: ExpertMath, x: torch.Tensor) -> torch.Tensor:
        weights = self._arena.views(slot, self._layouts[layer])
        decode = self._decodings[layer]
        dtype = self._dtype if autocast_enabled(x) else x.dtype
        return expert_ffn(math, weights if decode is None else decode(weights, dtype), x, dtype)

    def close(self) -> None:
        pass  # torch's threads are the process's


class KernelCompute(ExpertCompute):
    """The CPU's own kernels for layers whose slots are made for them, another way for the rest.

    Slots never move, so an expert's place is prepared once and kept, whichever expert stands there.
    """

    def __init__(
        self, kernels: CpuKernels, arena: SlotArena, slots: Sequence[CpuSlot | None], otherwise: ExpertCompute
    ) -> None:
        """slots: how each layer's experts stand; None: `otherwise` computes them. kernels: closed with this."""
        self._kernels, self._arena, self._otherwise = kernels, arena, otherwise
        # Layers with equal slots share what is prepared: a pool of all layers would hold slots x layers of it.
        self._slots = [None if slot is None else slots[slots.index(slot)] for slot in slots]
        self._prepared: dict[tuple[int, int], Rows] = {}
        self._calling = threading.Lock()
        self._closed = False

    def expert(self, layer: int, slot: int, math: ExpertMath, x: torch.Tensor) -> torch.Tensor:
        form = self._slots[layer]
        if form is None:
            return self._otherwise.expert(layer, slot, math, x)
        with self._calling:  # `close` may come from another thread
            if self._closed:
                raise OffmoeError("the model was closed; load it again with from_pretrained.")
            run = self._prepared.get((id(form), slot))
            if run is None:
                weights = form.expert(self._arena.views(slot, form.layout))
                run = self._prepared[id(form), slot] = self._kernels.expert(weights, form.glu)
            return run(x)

    def wave(
        self,
        layer: int,
        math: ExpertMath,
        experts: Sequence[tuple[int, int]],
        work: Work,
        slots: Slots,
    ) -> Iterator[torch.Tensor]:
        if self._slots[layer] is None:
            yield from self._otherwise.wave(layer, math, experts, work, slots)
            return
        # Converted once, not by every expert: a conversion of one row takes as long as a tenth of a small expert.
        dtype, work = work.hidden.dtype, work._replace(hidden=work.hidden.float())
        for rows in super().wave(layer, math, experts, work, slots):
            yield rows if work.pairs is None else rows.to(dtype)

    def close(self) -> None:
        with self._calling:
            self._closed = True
            self._prepared.clear()
            self._kernels.close()


EXPERTS_AT_ONCE = 8
"""Experts of one launch where several tokens are computed: those in slots do not wait for all that is still to come."""


class DeviceCompute(ExpertCompute):
    """A GPU's kernels, several experts in a launch, for layers whose slots they read; another way for the rest.

    Its numbers do depend, in the last bits, on which experts are computed together: how rows are cut into blocks does.
    """

    def __init__(self, kernels: Sequence[DeviceKernels | None], otherwise: ExpertCompute) -> None:
        """kernels: of each layer; None: `otherwise` computes it."""
        self._kernels, self._otherwise = kernels, otherwise

    def expert(self, layer: int, slot: int, math: ExpertMath, x: torch.Tensor) -> torch.Tensor:
        kernels = self._kernels[layer]
        if kernels is None:
            return self._otherwise.expert(layer, slot, math, x)
        return kernels.compute(Pairs([slot], [len(x)], torch.arange(len(x), device=x.device)), x)

    def wave(
        self,
        layer: int,
        math: ExpertMath,
        experts: Sequence[tuple[int, int]],
        work: Work,
        slots: Slots,
    ) -> Iterator[torch.Tensor]:
        kernels, pairs = self._kernels[layer], work.pairs
        if kernels is None:
            yield from self._otherwise.wave(layer, math, experts, work, slots)
            return
        if not experts:  # a wave of a step whose experts the host computes, or all are still to come
            return
        at_once = len(experts) if pairs is None else EXPERTS_AT_ONCE
        for start in range(0, len(experts), at_once):
            some = experts[start : start + at_once]
            numbers = [slot for _, slot in some]
            for slot in numbers:
                slots.ready(slot)
            if pairs is None:
                asked = Pairs(numbers, [1] * len(some))
            else:
                order = torch.cat([pairs[expert] for expert, _ in some])
                asked = Pairs(numbers, [len(pairs[expert]) for expert, _ in some], order, work.sharing)
            yield from kernels.compute(asked, work.hidden).split(list(asked.counts))

    def close(self) -> None:
        self._kernels = [None] * len(self._kernels)  # they hold the slots' memory
        self._otherwise.close()


class StoredLayer(Protocol):
    """How experts of one layer stand in slots: as they are at rest; `decode` says how."""

    @property
    def layout(self) -> ExpertLayout: ...
    @property
    def decode(self) -> ExpertDecoding | None: ...


def device_compute(
    layers: Sequence[StoredLayer], maths: Sequence[ExpertMath], arena: SlotArena, otherwise: ExpertCompute
) -> ExpertCompute:
    """A GPU's kernels for the layers whose slots they read, `otherwise` for the rest. maths: what each layer computes.

    Without Triton it is `otherwise` for all. What is not computed by kernels, and why, is logged.
    """
    if not available():
        logger.warning("Triton is not installed: experts are computed by torch's operators, on decoded weights")
        return otherwise
    kernels: list[DeviceKernels | None] = []
    reasons: Counter[str] = Counter()
    for layer, math in zip(layers, maths, strict=True):
        try:
            form = gpu_slot(layer.layout, layer.decode, math)
        except UnsupportedModelError as error:
            reasons[str(error)] += 1
            kernels.append(None)
        else:
            kernels.append(DeviceKernels(form.operands, form.glu, arena.memory, arena.starts))
    for reason, count in reasons.items():
        logger.warning("%d MoE layers are computed by torch's operators: %s", count, reason)
    return DeviceCompute(kernels, otherwise)


def build_compute(
    arena: SlotArena,
    layouts: Sequence[ExpertLayout],
    decodings: Sequence[ExpertDecoding | None],
    slots: Sequence[CpuSlot | None],
    *,
    dtype: torch.dtype,
    int8_activations: bool = False,
) -> ExpertCompute:
    """What computes the experts of a model; to be closed. Sequences have an entry per layer; dtype is the model's.

    Kernels have as many threads as torch has now, and no more than there are physical cores: more do not read memory
    faster.
    """
    by_torch = TorchCompute(arena, layouts, decodings, dtype)
    if not any(slots):
        return by_torch
    kernels = cpu_kernels(min(torch.get_num_threads(), physical_cores()), int8_activations)
    return KernelCompute(kernels, arena, slots, by_torch)

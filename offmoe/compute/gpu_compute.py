"""Experts computed by the GPU kernels, several in one launch, from slots as the checkpoint stores them.

Moves: nothing. The kernels read weights where they stand.
Bound: the device's memory bandwidth for few tokens, tensor cores for many.
Must never: launch before every slot of the launch is ready, or guess: what is not plainly the three matrices of a gated
expert is left to torch's operators, with a reason.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from offmoe.compute.compute import ComputeByLayer, ExpertCompute, LayerInput, Slotted, groups
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.gated import BIAS, MATRICES, GatedForm, gated_form, parameter_shapes, stored_tensors
from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import DeviceKernels, Launch, Pairs, Upload, available
from offmoe.compute.kernels.operands import GatedOperands, Operand, coded_operand, float_operand
from offmoe.compute.kernels.routed import RoutedLayer, RoutedState
from offmoe.device.arena import SlotArena
from offmoe.errors import UnsupportedModelError
from offmoe.quant.kernel_words import is_rows_first
from offmoe.storage.layout import Param
from offmoe.transfer.engine import TransferEngine

logger = logging.getLogger(__name__)

EXPERTS_PER_LAUNCH = 8
"""For experts that are on their way, if a step has several tokens. More would let some that have arrived wait."""


class GpuCompute(ExpertCompute):
    """The GPU kernels, for layers that have some.

    The last bits of its numbers depend on which experts are computed together: rows are cut into blocks accordingly.
    """

    is_invariant = False

    def __init__(self, kernels: Mapping[int, DeviceKernels], arena: SlotArena) -> None:
        """kernels: by index of the layer. arena: the slots that they read."""
        self._kernels, self._arena = kernels, arena

    def expert(self, layer: ExpertLayer, slot: int, x: torch.Tensor) -> torch.Tensor:
        pairs = Pairs([slot], [len(x)], torch.arange(len(x), device=x.device))
        return self._kernels[layer.index].compute(pairs, x)

    def wave(
        self, layer: ExpertLayer, experts: Sequence[Slotted], inputs: LayerInput, transfer: TransferEngine
    ) -> Iterator[tuple[Sequence[Slotted], torch.Tensor]]:
        kernels = self._kernels[layer.index]
        resident, coming = transfer.divide(experts)
        # What is here is computed while the rest arrives, in as few launches as intermediate rows allow.
        for group in groups(inputs.in_router_order(resident), inputs, kernels.most_pairs):
            yield group, kernels.compute(_pairs(group, inputs), inputs.hidden)
        per_launch = max(1, len(coming)) if inputs.pairs is None else EXPERTS_PER_LAUNCH
        for start in range(0, len(coming), per_launch):
            launched = coming[start : start + per_launch]
            transfer.ready(*[slot for _, slot in launched])
            yield launched, kernels.compute(_pairs(launched, inputs), inputs.hidden)

    def token(self, layer: ExpertLayer, slots: Sequence[int], hidden: torch.Tensor) -> torch.Tensor | None:
        kernels = self._kernels[layer.index]
        return kernels.compute(Pairs(slots, [1] * len(slots)), hidden) if len(slots) <= kernels.most_pairs else None

    def slots_moved(self) -> None:
        starts = np.array(self._arena.starts, dtype=np.int64)
        for kernels in self._kernels.values():
            kernels.read_from(self._arena.memory, starts)

    def close(self) -> None:
        self._kernels = {}  # they hold the slots' memory


def _pairs(experts: Sequence[Slotted], inputs: LayerInput) -> Pairs:
    slots, positions = [slot for _, slot in experts], inputs.positions(experts)
    if positions is None:
        return Pairs(slots, [1] * len(slots))
    return Pairs(slots, [inputs.num_rows(expert) for expert, _ in experts], positions, inputs.pairs_per_row)


def device_compute(
    layers: Sequence[ExpertLayer],
    arena: SlotArena,
    otherwise: ExpertCompute,
    upload: Upload | None = None,
    compile_for: tuple[torch.dtype, Sequence[int]] | None = None,
) -> ExpertCompute:
    """The GPU kernels for layers whose slots they read, `otherwise` for the rest; logs which are the rest, and why.

    Args:
        upload: as `DeviceKernels` takes it.
        compile_for: dtype of the inputs, and experts per token of each layer, to compile kernels for now. None: they
            are compiled when they are first launched.
    """
    if not available():
        logger.warning(
            "Triton is not installed: experts are computed by torch's operators, on decoded weights. "
            "For the GPU kernels, install Triton."
        )
        return otherwise
    kernels: dict[int, DeviceKernels] = {}
    starts = np.array(arena.starts, dtype=np.int64)  # once for all layers: 192 layers of 24,576 slots are many numbers
    reasons: Counter[str] = Counter()
    for layer in layers:
        try:
            operands, glu = _operands(layer)
        except UnsupportedModelError as error:
            reasons[str(error)] += 1
        else:
            kernels[layer.index] = DeviceKernels(operands, glu, arena.memory, starts, upload=upload)
    if compile_for is not None:
        _compile(kernels, *compile_for, reasons)
    for reason, count in reasons.items():
        logger.warning("%d MoE layers are computed by torch's operators: %s", count, reason)
    by_kernels = GpuCompute(kernels, arena)
    return ComputeByLayer([by_kernels if layer.index in kernels else otherwise for layer in layers])


def has_gpu_kernels(layer: ExpertLayer) -> bool:
    """Whether the GPU kernels compute a layer from its slots. They may still not compile for a device."""
    if not available():
        return False
    try:
        _operands(layer)
    except UnsupportedModelError:
        return False
    return True


class RoutedForm(NamedTuple):
    """What the kernels of routed.py need to know of a layer. pieces: parts of an expert at rest."""

    operands: GatedOperands
    glu: Glu
    pieces: int


def routed_forms(layers: Sequence[ExpertLayer], compute: ExpertCompute) -> list[RoutedForm] | str:
    """The layers for the kernels that need nothing of the host; or why they cannot have all of them.

    compute: of the same layers, with the GPU kernels where they compile.
    """
    if not all(isinstance(compute.of(layer.index), GpuCompute) for layer in layers):
        return "the GPU kernels do not compute every MoE layer"
    forms = []
    for layer in layers:
        if layer.assembly.convert is not None:
            return "experts are rearranged on their way into slots"
        forms.append(RoutedForm(*_operands(layer), len(layer.assembly.destinations)))
    return forms


def routed_layer(index: int, form: RoutedForm, state: RoutedState, arena: SlotArena, launch: Launch) -> RoutedLayer:
    """The kernels of one layer on the arena's slots."""
    return RoutedLayer(index, state, arena.memory, form.operands, form.glu, launch=launch)


def _compile(
    kernels: dict[int, DeviceKernels], dtype: torch.dtype, top_k: Sequence[int], reasons: Counter[str]
) -> None:
    """Compile the kernels of all layers; those that do not compile here are taken out, with a reason."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, of_layer in kernels.items():
        kinds.setdefault((*of_layer.kind, top_k[index]), []).append(index)
    for number, indices in enumerate(kinds.values(), 1):
        logger.info(
            "compiling GPU kernels, kind %d of %d: seconds the first time on a machine, then kept by Triton",
            number,
            len(kinds),
        )
        try:
            kernels[indices[0]].compile(dtype, top_k[indices[0]])
        except Exception as error:  # whatever a compiler, an assembler or a driver may raise for this device
            reasons[f"the GPU kernels do not compile here ({str(error).partition(chr(10))[0]})"] += len(indices)
            for index in indices:
                del kernels[index]


def _operands(layer: ExpertLayer) -> tuple[GatedOperands, Glu]:
    """Gate, up and down as they stand in the layer's slots, and the function that combines gate and up.

    Nothing is reordered, so every tensor crosses the link in one plain copy: the kernels read rows of words, bytes and
    floats as checkpoints store them.

    Raises:
        UnsupportedModelError: the kernels cannot compute these experts; the message is the reason.
    """
    if layer.unlike:
        raise UnsupportedModelError("an expert is stored otherwise than the others of its layer")
    layout, decode = layer.layout, layer.decode
    form = gated_form(stored_tensors(layout, decode), parameter_shapes(layout, decode), layer.math)
    gate, up, down = (_operand(layout.params, form, name) for name in MATRICES)
    if gate.kind != up.kind:
        raise UnsupportedModelError("gate and up are quantized differently")
    return GatedOperands(gate, up, down), form.glu


def _operand(params: Sequence[Param], form: GatedForm, name: str) -> Operand:
    rows = form.rows[name]
    tensor, inputs_first = form.tensors[rows.tensor], rows.tensor in form.inputs_first
    components = _components(params, form, name)
    if tensor.codec is None:
        whole = float_operand(components["weight"], inputs_first)
    elif inputs_first == is_rows_first(tensor.codec):
        raise UnsupportedModelError("quantized weights are stored transposed")
    else:
        whole = coded_operand(tensor.codec, components)
    if (whole.rows, whole.cols) != (tensor.shape[::-1] if inputs_first else tensor.shape):
        raise UnsupportedModelError(f"{tensor.destination.param} is stored in padded words")
    operand = whole.part(rows.size, rows.first, rows.step)
    if not form.biased:
        return operand
    bias = form.rows[name + BIAS]
    if form.tensors[bias.tensor].codec is not None or bias[1:] != rows[1:]:
        raise UnsupportedModelError("biases are stored in parts")
    return operand.with_bias(_components(params, form, name + BIAS)["weight"])


def _components(params: Sequence[Param], form: GatedForm, name: str) -> dict[str, Param]:
    """Where each component of a matrix's tensor stands in a slot."""
    tensor = form.tensors[form.rows[name].tensor]
    return {component: params[i] for component, i in tensor.components.items()}

"""Which layers a GPU's kernels can compute from slots as they are: what their experts' slots hold, as operands.

Nothing moves, and nothing is re-ordered: rows of words, bytes and floats are read by the kernels as checkpoints store
them, so that what crosses the link stays one plain copy per tensor. Tiles (`KernelSlot`) are read too, where something
else has made them. What it must never do: guess; whatever is not plainly a gated expert's three matrices is left to
torch's operators, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from offmoe.compute.cpu_slot import BIAS, MATRICES, KernelSlot
from offmoe.compute.kernels import ExpertMath, GatedFFN
from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.gating import gating_of
from offmoe.compute.kernels.operands import GatedOperands, Operand, coded_operand, float_operand, packed_operand
from offmoe.errors import UnsupportedModelError
from offmoe.quant import ExpertDecoding, Leaf, Mxfp4
from offmoe.storage.layout import Destination, ExpertLayout, Param


class DeviceForm(NamedTuple):
    """How the kernels see the experts of a layer."""

    operands: GatedOperands
    glu: Glu


def form_of_tiles(slot: KernelSlot) -> DeviceForm:
    """Of slots that were made for the CPU's kernels."""
    params = {param.name: param for param in slot.layout.params}
    if slot.stacked is not None:
        gate_up, down = (float_operand(params[name]) for name in slot.stacked)
        return DeviceForm(GatedOperands.stacked(gate_up, down), slot.glu)
    found = []
    for name, how in zip(MATRICES, slot.formats, strict=True):
        operand = float_operand(params[name]) if how is None else packed_operand(slot.layout, name, how)
        found.append(operand.with_bias(params[name + BIAS]) if slot.biased else operand)
    return DeviceForm(GatedOperands(*found), slot.glu)


def device_form(layout: ExpertLayout, decode: ExpertDecoding | None, math: ExpertMath) -> DeviceForm | str:
    """Of slots as the checkpoint stores experts, or why the kernels do not compute them.

    decode: from what slots hold to the module's parameters, if that is something else. math: what the module computes.
    """
    if not isinstance(math, GatedFFN) or math.normalize is not None:
        return "the experts are no gated feed-forward networks of the usual form"
    gating = gating_of(math.activate)
    if gating is None:
        return "the kernels do not have the activation"
    params = {param.name: param for param in layout.params}
    try:
        if decode is None:
            matrices = {name: float_operand(params[name], math.transposed) for name in (math.up, math.down)}
            biases = {name: params[name + "_bias"] for name in matrices if math.biased}
        elif decode.assembly.convert is not None:
            return "the checkpoint's quantized weights are rearranged when they are loaded"
        else:
            matrices, biases = _stored(params, decode, math)
    except UnsupportedModelError as error:
        return str(error)
    if math.biased and biases.keys() != {math.up, math.down}:
        return "biases are stored in parts"
    matrices |= {name: matrices[name].with_bias(bias) for name, bias in biases.items() if name in matrices}
    if matrices.keys() == {math.up, math.down}:
        return DeviceForm(GatedOperands.stacked(matrices[math.up], matrices[math.down], gating.interleaved), gating.glu)
    if matrices.keys() == {"gate", "up", math.down} and not gating.interleaved and not math.biased:
        gate, up = matrices["gate"], matrices["up"]
        if (gate.kind, gate.rows, gate.cols) == (up.kind, up.rows, up.cols):
            return DeviceForm(GatedOperands(gate, up, matrices[math.down]), gating.glu)
    return "gate, up and down are stored in parts that the kernels cannot take"


def _stored(
    params: Mapping[str, Param], decode: ExpertDecoding, math: GatedFFN
) -> tuple[dict[str, Operand], dict[str, Param]]:
    """Matrices by the module's names, or "gate" and "up" where these are apart; biases by the name of their matrix."""
    matrices: dict[str, Operand] = {}
    biases: dict[str, Param] = {}
    for leaf, part in zip(decode.leaves, decode.assembly.destinations, strict=True):
        whole = decode.shapes[part.param]
        parts = {component: params[name] for component, name in leaf.params.items()}
        if len(whole) == 1:
            if leaf.codec is not None or leaf.shape[-1] != whole[0]:
                raise UnsupportedModelError(f"{part.param} is stored in parts")
            biases[part.param.removesuffix("_bias")] = parts["weight"]
            continue
        operand = _operand(leaf, parts, part, math)
        both, inputs = reversed(whole) if math.transposed else whole
        start = part.start if operand.rows != both else 0
        if operand.cols != inputs or (operand.rows != both and part.dim != _outputs_dim(part, math)):
            raise UnsupportedModelError(f"{part.param} is stored in parts that are no rows of it")
        if operand.rows == both:
            matrices[part.param] = operand
        elif part.param == math.up and 2 * operand.rows == both and start in (0, operand.rows):
            matrices["up" if start else "gate"] = operand
        else:
            raise UnsupportedModelError(f"{part.param} is stored in too many parts")
    return matrices, biases


def _operand(leaf: Leaf, parts: Mapping[str, Param], part: Destination, math: GatedFFN) -> Operand:
    inputs_first = _outputs_dim(part, math) == 1
    if leaf.codec is None:
        return float_operand(parts["weight"], inputs_first)
    if inputs_first != isinstance(leaf.codec, Mxfp4):  # the only one that decodes to [in, out]
        raise UnsupportedModelError("quantized weights are stored transposed")
    return coded_operand(leaf.codec, parts)


def _outputs_dim(part: Destination, math: GatedFFN) -> int:
    """Dimension of outputs of what is stored."""
    return 1 if part.transposed != math.transposed else 0

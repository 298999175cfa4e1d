"""Slots for the GPU kernels: an expert's gate, up and down as operands, where the checkpoint's own tensors stand.

Moves: nothing, and nothing is reordered. The kernels read rows of words, bytes and floats as checkpoints store them, so
every tensor crosses the link in one plain copy.
Bound: none.
Must never: guess. What is not plainly the three matrices of a gated expert is left to torch's operators, with a reason.
"""

from __future__ import annotations

from offmoe.compute.gated import BIAS, MATRICES, GatedForm, gated_form, parameter_shapes, stored_tensors
from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.operands import GatedOperands, Operand, coded_operand, float_operand
from offmoe.compute.kernels.torch_ffn import ExpertMath
from offmoe.errors import UnsupportedModelError
from offmoe.quant.decode import ExpertDecoding
from offmoe.quant.kernel_words import is_rows_first
from offmoe.storage.layout import ExpertLayout, Param


def gpu_slot(layout: ExpertLayout, decode: ExpertDecoding | None, math: ExpertMath) -> tuple[GatedOperands, Glu]:
    """The operands in slots of `layout`, and the function that combines gate and up.

    Args:
        layout: of the layer's slots, which hold experts as the checkpoint stores them.
        decode: from the slot to the parameters of the experts module; None: the slot holds these.
        math: what the layer's experts compute.
    Raises:
        UnsupportedModelError: the kernels cannot compute these experts; the message is the reason.
    """
    form = gated_form(stored_tensors(layout, decode), parameter_shapes(layout, decode), math)
    gate, up, down = (_operand(layout, form, name) for name in MATRICES)
    if gate.kind != up.kind:
        raise UnsupportedModelError("gate and up are quantized differently")
    return GatedOperands(gate, up, down), form.glu


def _operand(layout: ExpertLayout, form: GatedForm, name: str) -> Operand:
    rows = form.rows[name]
    tensor, inputs_first = form.tensors[rows.tensor], rows.tensor in form.inputs_first
    components = _components(layout, form, name)
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
    return operand.with_bias(_components(layout, form, name + BIAS)["weight"])


def _components(layout: ExpertLayout, form: GatedForm, name: str) -> dict[str, Param]:
    """Where each component of a matrix's tensor stands in a slot."""
    tensor = form.tensors[form.rows[name].tensor]
    return {component: layout.params[i] for component, i in tensor.components.items()}

"""How an expert's gate, up and down matrices follow from the tensors that the checkpoint stores.

CPU slots and GPU slots need the same answer: which rows of which tensor are the gate, the up and the down projection,
and which way round they stand. `gated_form` gives it from shapes and places alone. It raises UnsupportedModelError,
with the reason, for whatever is not plainly a gated feed-forward network. Must never guess, nor take one activation for
another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.torch_ffn import ExpertMath, GatedFFN
from offmoe.errors import UnsupportedModelError
from offmoe.quant.codec import Codec
from offmoe.quant.decode import ExpertDecoding
from offmoe.quant.packed_weight import SCALES, TILES
from offmoe.storage.layout import Destination, ExpertLayout

MATRICES = ("gate", "up", "down")
BIAS = ".bias"
"""A bias is called as its matrix is, with this behind it."""

POINTS = 41
"""Values of gate and of up that are tried, per range. Odd, so that 0 is one of them."""
NEAR, FAR = 4.0, 60.0
"""Ranges of the tried values: activations differ up to NEAR; every limit that is worth clamping to is below FAR."""
TOLERANCE = 1e-5
"""Largest difference of equal functions in float32, relative to the largest product. gelu and its tanh form differ by
1e-3."""

DTYPE_OF = ("weight", "scale", "scales", TILES[SCALES])
"""Components that have the dtype of a stored tensor."""

NOT_THREE = "gate, up and down are stored in parts that kernels cannot take"


class Gating(NamedTuple):
    """How gate and up stand in one row, and the function that combines them."""

    glu: Glu
    interleaved: bool
    """Gate and up take turns along a row, gate first; otherwise gate is the first half."""


class StoredTensor(NamedTuple):
    """One tensor of an expert as the checkpoint stores it."""

    components: Mapping[str, int]
    """Per component of the codec ("weight" without one), the index of its raw tensor."""
    codec: Codec | None
    """None: the tensor is not quantized."""
    shape: tuple[int, ...]
    """Its shape once it is decoded."""
    dtype: torch.dtype
    """The dtype of the component "weight", or of the scales where no component is called so."""
    destination: Destination
    """Where its values go in the parameters of the experts module."""


class RowRange(NamedTuple):
    """Rows of one stored tensor that make up a matrix or a bias: `size` rows, every `step`-th from `first` on."""

    tensor: int
    first: int
    step: int
    size: int


@dataclass(frozen=True)
class GatedForm:
    """A gated feed-forward network: glu(gate(x), up(x)) through down, out of stored tensors."""

    tensors: tuple[StoredTensor, ...]
    rows: Mapping[str, RowRange]
    """Per matrix, and per bias where there are biases, its rows. Row r of a matrix computes output r."""
    inputs_first: frozenset[int]
    """Indices of the tensors that stand [in, out], so that their rows are columns of the tensor."""
    glu: Glu
    biased: bool
    transposed: bool
    """The matrices of the experts module are [in, out]."""
    interleaved: bool
    """Gate and up take turns along the rows of one tensor, gate first."""

    def shape(self, name: str) -> tuple[int, int]:
        """[outputs, inputs] of a matrix."""
        rows = self.rows[name]
        shape = self.tensors[rows.tensor].shape
        return rows.size, shape[0] if rows.tensor in self.inputs_first else shape[1]


def stored_tensors(layout: ExpertLayout, decode: ExpertDecoding | None) -> tuple[StoredTensor, ...]:
    """The tensors that stand in a slot of `layout`; components count its parameters.

    Args:
        layout: of a slot without kernels.
        decode: from the slot to the parameters of the experts module; None: the slot holds these.
    Raises:
        UnsupportedModelError: decoded tensors are rearranged by code, not by place.
    """
    if decode is None:
        params = enumerate(layout.params)
        return tuple(StoredTensor({"weight": i}, None, p.shape, p.dtype, Destination(p.name, 0, 0)) for i, p in params)
    if decode.assembly.convert is not None:
        raise UnsupportedModelError("the checkpoint's quantized weights are rearranged when they are loaded")
    index = {param.name: i for i, param in enumerate(layout.params)}
    tensors = []
    for leaf, to in zip(decode.leaves, decode.assembly.destinations, strict=True):
        components = {component: index[name] for component, name in leaf.params.items()}
        main = next((c for c in DTYPE_OF if c in components), next(iter(components)))
        shape = leaf.shape[-len(decode.shapes[to.param]) :]
        tensors.append(StoredTensor(components, leaf.codec, shape, layout.params[components[main]].dtype, to))
    return tuple(tensors)


def parameter_shapes(layout: ExpertLayout, decode: ExpertDecoding | None) -> Mapping[str, tuple[int, ...]]:
    """The shapes of the experts module's parameters, from a slot without kernels."""
    return {param.name: param.shape for param in layout.params} if decode is None else decode.shapes


def gated_form(tensors: Sequence[StoredTensor], shapes: Mapping[str, tuple[int, ...]], math: ExpertMath) -> GatedForm:
    """Find gate, up and down of an expert that computes `math`.

    Args:
        tensors: all tensors of one expert.
        shapes: of the parameters that `math` computes with, by name.
    Raises:
        UnsupportedModelError: there is no such form; the message is the reason.
    """
    if not isinstance(math, GatedFFN) or math.normalize is not None:
        raise UnsupportedModelError("the experts are no gated feed-forward networks of the usual form")
    gating = gating_of(math.activate)
    if gating is None:
        raise UnsupportedModelError("kernels do not have the activation")
    rows: dict[str, RowRange] = {}
    inputs_first = set()
    for i, tensor in enumerate(tensors):
        if len(tensor.shape) == 2 and _stands_inputs_first(tensor.destination, math):
            inputs_first.add(i)
        for name, of_matrix in _rows_in(i, tensor, shapes, math, gating.interleaved).items():
            if name in rows:
                raise UnsupportedModelError(f"{tensor.destination.param} is stored in too many parts")
            rows[name] = of_matrix
    wanted = {*MATRICES, *((name + BIAS for name in MATRICES) if math.biased else ())}
    if rows.keys() != wanted:
        raise UnsupportedModelError(NOT_THREE)
    return GatedForm(
        tensors=tuple(tensors),
        rows=rows,
        inputs_first=frozenset(inputs_first),
        glu=gating.glu,
        biased=math.biased,
        transposed=math.transposed,
        interleaved=gating.interleaved,
    )


def _stands_inputs_first(to: Destination, math: GatedFFN) -> bool:
    return to.transposed != math.transposed


def _rows_in(
    index: int, tensor: StoredTensor, shapes: Mapping[str, tuple[int, ...]], math: GatedFFN, interleaved: bool
) -> dict[str, RowRange]:
    """The matrices or biases that one tensor holds."""
    param = tensor.destination.param
    start, count = _output_range(tensor, shapes[param], math)
    is_bias = math.biased and param.endswith("_bias")
    name, suffix = (param.removesuffix("_bias"), BIAS) if is_bias else (param, "")
    if name == math.down:
        return {"down" + suffix: RowRange(index, 0, 1, count)}
    if name != math.up:
        raise UnsupportedModelError(NOT_THREE)
    both = shapes[math.up][1 if math.transposed else 0]
    half = both // 2
    if count == both and interleaved:
        return {"gate" + suffix: RowRange(index, 0, 2, half), "up" + suffix: RowRange(index, 1, 2, half)}
    if count == both:
        return {"gate" + suffix: RowRange(index, 0, 1, half), "up" + suffix: RowRange(index, half, 1, half)}
    step = tensor.destination.step
    if count == half and interleaved and step == 2 and start in (0, 1):
        return {("up" if start else "gate") + suffix: RowRange(index, 0, 1, half)}
    if count == half and start in (0, half) and step == 1 and not interleaved:
        return {("up" if start else "gate") + suffix: RowRange(index, 0, 1, half)}
    raise UnsupportedModelError(NOT_THREE)


def _output_range(tensor: StoredTensor, whole: tuple[int, ...], math: GatedFFN) -> tuple[int, int]:
    """(first output, number of outputs) that a tensor holds of its parameter, whose shape is `whole`."""
    to = tensor.destination
    if len(whole) == 1:
        return to.start, tensor.shape[-1]
    inputs_first = _stands_inputs_first(to, math)
    count, inputs = reversed(tensor.shape) if inputs_first else tensor.shape
    if inputs != whole[0 if math.transposed else 1]:
        raise UnsupportedModelError(f"{to.param} is stored in parts that are no rows of it")
    return to.start if to.dim == (1 if inputs_first else 0) else 0, count


def gating_of(activate: Callable[[torch.Tensor], torch.Tensor]) -> Gating | None:
    """The kernels' built-in function that equals `activate`, [n, 2I] -> [n, I]; None if there is none.

    Names of activations say little: architectures clamp before or after them, interleave gate and up, or add one. So
    the module's own function gets numbers for which the candidates differ, and its results decide.
    """
    points = torch.cat([torch.linspace(-reach, reach, POINTS) for reach in (NEAR, FAR)])
    gate, up = torch.cartesian_prod(points, points).T.reshape(2, -1, 2)  # [n, 2] each
    owner = getattr(activate, "__self__", None)
    glus = [Glu("silu"), Glu("gelu_tanh")]
    limit, alpha = getattr(owner, "limit", None), getattr(owner, "alpha", None)
    if isinstance(limit, (int, float)) and isinstance(alpha, (int, float)):
        glus.append(Glu("clamped", float(limit), float(alpha)))
    for interleaved in (False, True):
        both = torch.stack([gate, up], dim=2 if interleaved else 1).reshape(-1, 4)  # [n, 2I]
        try:
            with torch.no_grad():
                result = activate(both)
        except (RuntimeError, TypeError, ValueError):  # a meta tensor, or another signature
            return None
        if result.shape != gate.shape or result.dtype != gate.dtype or result.device != gate.device:
            return None
        for glu in glus:
            if _agree(result, glu(gate, up)):
                return Gating(glu, interleaved)
    return None


def _agree(result: torch.Tensor, expected: torch.Tensor) -> bool:
    is_near = (result - expected).abs().max() <= TOLERANCE * expected.abs().clamp(min=1).max()
    return bool(is_near) and torch.allclose(result, expected, rtol=1e-4, atol=TOLERANCE)

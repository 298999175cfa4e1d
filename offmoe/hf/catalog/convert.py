"""How the tensors of one expert become its parameters: as blocks to copy, or by transformers' own operations.

`blocks_of` follows a converter through shapes alone. It says which source tensor ends up in which block of the
parameter, so that copying needs no intermediate. What it cannot follow (splitting) becomes an
`ExpertConversion`: the converter's operations on one expert's tensors, run on the host and bound by memory bandwidth. A
conversion is checked on random bytes of two experts, together and alone. An operation that lets one expert's values
depend on another's is refused, because a cache that reads single experts could not run it. So an expert always gets the
bytes that stock transformers would give it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.catalog.groups import Group
from offmoe.hf.upstream import Alternate, Concatenate, MergeModulelist, Transpose, run_converter, steps
from offmoe.quant.codec import Kind
from offmoe.storage.layout import Destination


class Block(NamedTuple):
    """The part of a value that one source tensor fills."""

    source: int
    """Index of the source tensor's pattern."""
    start: tuple[int, ...]
    """First index of the block in the value."""
    shape: tuple[int, ...]
    """Shape of the block."""
    swapped: bool = False
    """Whether the source tensor's last two dimensions are exchanged."""
    step: int = 1
    """How far the block's rows are apart along the dimension in which blocks follow each other."""


class Value(NamedTuple):
    """An intermediate result of a converter: its shape, and the blocks that it consists of."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def axis(self) -> int:
        """The dimension along which blocks follow each other; 0, the experts' dimension, if there is only one block."""
        return next((i for block in self.blocks for i, start in enumerate(block.start) if start), 0)


def blocks_of(group: Group, expected: tuple[int, ...]) -> Value | None:
    """Work out which blocks one expert's parameter consists of, from shapes alone.

    Args:
        group: the tensors, their kinds and their converter.
        expected: the parameter's shape for one expert, [1, ...].

    Returns:
        The parameter as blocks, or None if it does not consist of blocks. Its shape differs from `expected` if the
        shapes contradict each other; the caller must check that.
    """
    order = list(group.names)
    values: dict[str, Value] = {}
    for i, (pattern, kind) in enumerate(zip(order, group.kinds, strict=True)):
        shape = kind.shape if group.per_expert and group.converter is not None else (1, *kind.shape)
        values[pattern] = _whole(i, shape)
    if group.converter is None:
        return values[order[0]]
    known = steps(group.converter)
    if known is None or len(group.converter.target_patterns) > 1:
        return None
    for number, operation in enumerate(known):
        match operation:
            case MergeModulelist(dim=dim):
                if number or dim != 0:
                    return None
                values = {p: _whole(value.blocks[0].source, (1, *value.shape)) for p, value in values.items()}
            case Concatenate(dim=dim):
                inputs = [values[p] for p in group.converter.source_patterns if p in values]
                if not inputs or not dim % len(inputs[0].shape) > 0 or len({len(v.shape) for v in inputs}) > 1:
                    return None
                values = {order[0]: _joined(inputs, dim % len(inputs[0].shape))}
            case Alternate(transposed=transposed):
                pair = [values[p] for p in group.converter.source_patterns if p in values]
                if len(pair) != 2 or pair[0].shape != pair[1].shape or any(len(v.blocks) > 1 for v in pair):
                    return None
                values = {order[0]: _alternating(pair, transposed)}
            case Transpose(dim0=dim0, dim1=dim1, check_dims=check):
                if len(values) > 1:
                    return None
                pattern, value = next(iter(values.items()))
                if check and value.shape == expected:
                    continue
                if len(value.shape) != 3 or {dim0 % 3, dim1 % 3} != {1, 2}:
                    return None
                values = {pattern: _swapped(value)}
    return next(iter(values.values())) if len(values) == 1 else None


def blocks_of_share(group: Group, expected: tuple[int, ...], model: PreTrainedModel) -> Value:
    """Find out which blocks one expert of a divided list consists of, by running the converter on random experts.

    The converter gets two experts per share, all different. Each must come out in its own share, as its source tensors
    one behind the other.

    Args:
        group: the tensors of one share, their kinds and their converter.
        expected: the parameter's shape for one expert, without the experts' dimension.
        model: the model, on any device.

    Raises:
        UnsupportedModelError: an expert comes out otherwise.
    """
    assert group.converter is not None
    assert group.share is not None
    generator = torch.Generator().manual_seed(0)
    inputs = {
        pattern: [_random(kind, generator) for _ in range(2 * len(group.share.targets))]
        for pattern, kind in zip(group.names, group.kinds, strict=True)
    }
    pairs = {target: (2, *model.get_parameter(target).shape[1:]) for target in group.share.targets}
    try:
        pair = run_converter(group.converter, inputs, group.share.targets[0], model, pairs)[group.target]
    except Exception as error:  # whatever an operation of transformers raises on these shapes
        raise _not_one_by_one(group.target, f"{type(error).__name__}: {error}") from error
    sources = [[tensors[2 * group.share.number + i] for tensors in inputs.values()] for i in range(2)]
    wholes = [_whole(i, (1, *kind.shape)) for i, kind in enumerate(group.kinds)]
    for dim in range(len(expected)):
        joinable = len({(*kind.shape[:dim], *kind.shape[dim + 1 :]) for kind in group.kinds}) == 1
        if joinable and len(pair) == 2 and all(_same_bytes(pair[i], torch.cat(sources[i], dim)) for i in range(2)):
            return _joined(wholes, dim + 1)
    raise _not_one_by_one(group.target, "an expert is not made of its own tensors alone")


def _not_one_by_one(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the conversion of {name!r} cannot be done one expert at a time ({why}); convert the checkpoint with "
        "save_pretrained(save_original_format=False) of transformers first"
    )


def _whole(source: int, shape: tuple[int, ...]) -> Value:
    """A value that one source tensor fills."""
    return Value(shape, (Block(source, (0,) * len(shape), shape),))


def _joined(values: Sequence[Value], dim: int) -> Value:
    blocks, size = [], 0
    for value in values:
        for block in value.blocks:
            start = list(block.start)
            start[dim] += size
            blocks.append(block._replace(start=tuple(start)))
        size += value.shape[dim]
    shape = list(values[0].shape)
    shape[dim] = size
    return Value(tuple(shape), tuple(blocks))


def _swapped(value: Value) -> Value:
    def swap(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (*sizes[:-2], sizes[-1], sizes[-2])

    blocks = (Block(b.source, swap(b.start), swap(b.shape), not b.swapped) for b in value.blocks)
    return Value(swap(value.shape), tuple(blocks))


def _alternating(pair: Sequence[Value], transposed: bool) -> Value:
    """Rows of two values of one block each in turn; with `transposed`, as columns."""
    shape = pair[0].shape if not transposed else (*pair[0].shape[:-2], pair[0].shape[-1], pair[0].shape[-2])
    start = (0,) * (len(shape) - 1)
    blocks = (Block(v.blocks[0].source, (*start, i), shape, transposed, step=2) for i, v in enumerate(pair))
    return Value((*shape[:-1], 2 * shape[-1]), tuple(blocks))


def destinations_of(param: str, value: Value) -> list[Destination] | None:
    """Where each source tensor goes in one expert's parameter; None if a block is cut in two dimensions."""
    out: dict[int, Destination] = {}
    for block in value.blocks:
        if sum(start > 0 for start in block.start) > 1:
            return None
        dim = max(value.axis - 1, 0)
        start = block.start[dim + 1] if len(block.start) > 1 else 0
        if block.swapped:
            dim = 1 - dim  # counted in the transpose, which is what the source looks like
        out[block.source] = Destination(param, dim, start, block.swapped, block.step)
    return [out[source] for source in sorted(out)]


@dataclass(frozen=True)
class ExpertConversion:
    """An `Assembly.convert` that turns one expert's tensors into its parameters by transformers' own operations."""

    model: PreTrainedModel
    name: str
    """Full name of the experts module."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each parameter of one expert, without the experts' dimension."""
    groups: tuple[Group, ...]

    def __call__(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        params = self._run([[tensor] for tensor in tensors])
        return {param: params[f"{self.name}.{param}"][0] for param in self.shapes}

    def check(self) -> dict[str, torch.dtype]:
        """Check the conversion on two random experts, together and alone.

        Returns:
            The dtype of every parameter.

        Raises:
            UnsupportedModelError: an expert comes out differently alone and together with another one.
            CheckpointError: a parameter comes out in another shape than the model's.
        """
        generator = torch.Generator().manual_seed(0)
        kinds = [kind for group in self.groups for kind in group.kinds]
        first, second = ([_random(kind, generator) for kind in kinds] for _ in range(2))
        try:
            both = self._run([list(pair) for pair in zip(first, second, strict=True)])
            alone = [self(first), self(second)]
        except Exception as error:  # whatever an operation of transformers raises on these shapes
            raise _not_one_by_one(self.name, f"{type(error).__name__}: {error}") from error
        for param, shape in self.shapes.items():
            together = both[f"{self.name}.{param}"]
            if tuple(together.shape) != (2, *shape):
                raise CheckpointError(
                    f"the conversion of {self.name!r} gives {param!r} the shape {list(together.shape[1:])} per "
                    f"expert, the model expects {list(shape)}; config.json and the shards are not of the same model"
                )
            if not all(_same_bytes(together[i], alone[i][param]) for i in range(2)):
                raise UnsupportedModelError(
                    f"the conversion of {self.name!r} mixes experts in {param!r}, so single experts cannot be read "
                    "from this checkpoint; convert it with save_pretrained(save_original_format=False) of "
                    "transformers first"
                )
        return {param: alone[0][param].dtype for param in self.shapes}

    def _run(self, tensors: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Convert n experts; tensors[p][i] is pattern p of expert i. Returns parameters [n, ...] by full name."""
        num = len(tensors[0])
        shapes = {f"{self.name}.{param}": (num, *shape) for param, shape in self.shapes.items()}
        out: dict[str, torch.Tensor] = {}
        rest = iter(tensors)
        for group in self.groups:
            own = {pattern: next(rest) for pattern in group.names}
            if group.converter is None:
                out[group.target] = torch.stack(list(own.popitem()[1]))
                continue
            inputs: Mapping[str, Sequence[torch.Tensor]] = (
                own if group.per_expert else {pattern: [torch.stack(list(rows))] for pattern, rows in own.items()}
            )
            out |= run_converter(group.converter, inputs, group.target, self.model, shapes)
        return out


def _random(kind: Kind, generator: torch.Generator) -> torch.Tensor:
    nbytes = torch.Size(kind.shape).numel() * kind.dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(kind.dtype).view(kind.shape)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits; == would not do, because random bytes contain NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))

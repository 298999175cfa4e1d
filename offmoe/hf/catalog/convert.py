"""How the tensors of one expert become its parameters: as blocks to copy, or by running transformers' own operations.

Nothing moves while this is worked out; the bytes of two experts are made up when a conversion has to be tried. `trace`
follows a converter through shapes alone and says which source tensor ends up in which block of the parameter, so that
copying needs no intermediate. What it cannot follow (interleaving, splitting) becomes an `ExpertConversion`: the
converter's operations on one expert's tensors, on the host, bounded by memory bandwidth. It is tried on random bytes of
two experts together and apart: an operation that lets one expert's values depend on another's is refused, because a
cache that reads single experts could not run it.

What it must never do: give an expert other bytes than stock transformers would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.upstream import Concat, Merge, Swap, WeightConverter, run_converter, steps
from offmoe.quant.codec import Encoding
from offmoe.storage.layout import Destination

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Share(NamedTuple):
    """One of the equal shares into which a converter divides a list of experts; targets: the parameters, in order."""

    number: int
    targets: tuple[str, ...]


@dataclass
class Group:
    """The checkpoint's tensors that one converter (or, without one, a renaming) turns into the parameter `target`.

    names: per source pattern, in the loader's order: one tensor per expert, or a single one with all experts' rows.
    owned: expert -> its tensor, where the model itself has a parameter per expert; `settled` makes them names. entries:
    experts that there may be tensors or rows of, if some are nobody's (behind the others). share: given if the
    converter makes the experts of several modules of one list; then names are this module's.
    """

    target: str
    converter: WeightConverter | None
    names: dict[str, list[str]] = field(default_factory=dict)
    owned: dict[int, str] = field(default_factory=dict)
    entries: int | None = None
    share: Share | None = None

    def settled(self, num_experts: int) -> Group:
        """Once all tensors are known: with `owned` in expert order among the names, and without nobody's tensors."""
        if self.owned:
            self.names[self.target] = [self.owned[expert] for expert in sorted(self.owned)]
        for pattern, names in self.names.items():
            if len(names) == self.entries:
                self.names[pattern] = names[:num_experts]
        return self

    @property
    def per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        if self.owned:
            return True
        if self.converter is None:
            return False
        known = steps(self.converter)
        return (known is not None and isinstance(known[0], Merge)) or any(len(n) > 1 for n in self.names.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """Full names of all parameters this group makes; `target` is the first."""
        if self.converter is None or self.share is not None:
            return (self.target,)
        patterns = self.converter.target_patterns
        return tuple(self.target.replace(patterns[0], pattern) for pattern in patterns)


class Kind(NamedTuple):
    """Shape (of one expert, without the experts' dimension), dtype and encoding that all tensors of a pattern have.

    encoding: if they are quantized; shape is what they are decoded to, dtype stands for any.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: Encoding | None = None


class Block(NamedTuple):
    """Place of a source tensor in a value. source: index of its pattern. swapped: its last two dimensions are."""

    source: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    swapped: bool = False


class Value(NamedTuple):
    """A tensor that a converter has in hand, as the blocks it is made of."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def axis(self) -> int:
        """The dimension along which blocks follow each other; 0, the experts' own, if there is only one block."""
        return next((i for block in self.blocks for i, start in enumerate(block.start) if start), 0)


def trace(group: Group, shapes: Sequence[tuple[int, ...]], expected: tuple[int, ...]) -> Value | None:
    """What the group makes of one expert, [1, ...], as blocks; None if that cannot be said in blocks.

    shapes: of one expert, per pattern of `group.names`. expected: the parameter's, for one expert [1, ...]. Shapes that
    contradict each other come out as a value of another shape than expected; judging that is the caller's.
    """
    order = list(group.names)
    values: dict[str, Value] = {}
    for i, pattern in enumerate(order):
        shape = shapes[i] if group.per_expert and group.converter is not None else (1, *shapes[i])
        values[pattern] = Value(shape, (Block(i, (0,) * len(shape), shape),))
    if group.converter is None:
        return values[order[0]]
    known = steps(group.converter)
    if known is None or len(group.converter.target_patterns) > 1:
        return None
    for number, step in enumerate(known):
        match step:
            case Merge(dim):
                if number or dim != 0:
                    return None
                values = {pattern: _stacked(value) for pattern, value in values.items()}
            case Concat(dim):
                inputs = [values[p] for p in group.converter.source_patterns if p in values]
                if not inputs or not dim % len(inputs[0].shape) > 0 or len({len(v.shape) for v in inputs}) > 1:
                    return None
                values = {order[0]: _joined(inputs, dim % len(inputs[0].shape))}
            case Swap(dim0, dim1, check):
                if len(values) > 1:
                    return None
                pattern, value = next(iter(values.items()))
                if check and value.shape == expected:
                    continue
                if len(value.shape) != 3 or {dim0 % 3, dim1 % 3} != {1, 2}:
                    return None
                values = {pattern: _swapped(value)}
    return next(iter(values.values())) if len(values) == 1 else None


def trace_share(group: Group, kinds: Sequence[Kind], expected: tuple[int, ...], model: PreTrainedModel) -> Value:
    """What the group makes of one expert of its share, [1, ...], found by trying the converter on made-up experts.

    Two per share, all different: each must come out in its own share, as its sources one behind the other. kinds: per
    pattern. expected: the parameter's shape for one expert, [...]. Raises UnsupportedModelError if it is otherwise.
    """
    assert group.converter is not None
    assert group.share is not None
    generator = torch.Generator().manual_seed(0)
    made_up = {
        pattern: [_random(kind, generator) for _ in range(2 * len(group.share.targets))]
        for pattern, kind in zip(group.names, kinds, strict=True)
    }
    pairs = {target: (2, *model.get_parameter(target).shape[1:]) for target in group.share.targets}
    try:
        made = run_converter(group.converter, made_up, group.share.targets[0], model, pairs)[group.target]
    except Exception as error:  # whatever an operation of transformers raises on these shapes
        raise _not_one_by_one(group.target, f"{type(error).__name__}: {error}") from error
    sources = [[tensors[2 * group.share.number + i] for tensors in made_up.values()] for i in range(2)]
    wholes = [
        Value((1, *kind.shape), (Block(i, (0,) * (1 + len(kind.shape)), (1, *kind.shape)),))
        for i, kind in enumerate(kinds)
    ]
    for dim in range(len(expected)):
        joinable = len({(*kind.shape[:dim], *kind.shape[dim + 1 :]) for kind in kinds}) == 1
        if joinable and len(made) == 2 and all(_same_bytes(made[i], torch.cat(sources[i], dim)) for i in range(2)):
            return _joined(wholes, dim + 1)
    raise _not_one_by_one(group.target, "an expert is not made of its own tensors alone")


def _not_one_by_one(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the conversion of {name!r} cannot be done one expert at a time ({why}); convert the checkpoint with "
        "save_pretrained(save_original_format=False) of transformers first"
    )


def _stacked(value: Value) -> Value:
    blocks = (b._replace(start=(0, *b.start), shape=(1, *b.shape)) for b in value.blocks)
    return Value((1, *value.shape), tuple(blocks))


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


def destinations_of(param: str, value: Value) -> list[Destination] | None:
    """Where each source goes in the parameter of one expert; None if a block is cut in two dimensions."""
    out: dict[int, Destination] = {}
    for block in value.blocks:
        if sum(start > 0 for start in block.start) > 1:
            return None
        dim = max(value.axis - 1, 0)
        start = block.start[dim + 1] if len(block.start) > 1 else 0
        if block.swapped:
            dim = 1 - dim  # counted in the transpose, which is what the source looks like
        out[block.source] = Destination(param, dim, start, block.swapped)
    return [out[source] for source in sorted(out)]


@dataclass(frozen=True)
class ExpertConversion:
    """Turn the tensors of one expert into its parameters with transformers' own operations; an `Assembly.convert`.

    shapes: per parameter of the layer `name`, without the experts' dimension.
    """

    model: PreTrainedModel
    name: str
    shapes: dict[str, tuple[int, ...]]
    groups: tuple[Group, ...]

    def __call__(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        made = self._run([[tensor] for tensor in tensors])
        return {param: made[f"{self.name}.{param}"][0] for param in self.shapes}

    def check(self, kinds: Sequence[Kind]) -> dict[str, torch.dtype]:
        """Try it on made-up experts of these kinds (per pattern, groups in order) -> dtype of every parameter.

        Raises UnsupportedModelError if an expert comes out otherwise alone than beside another one, CheckpointError if
        a parameter comes out in another shape than the model's.
        """
        generator = torch.Generator().manual_seed(0)
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
        """tensors[p][i]: pattern p of the i-th of n experts -> parameters [n, ...] by full name."""
        num = len(tensors[0])
        shapes = {f"{self.name}.{param}": (num, *shape) for param, shape in self.shapes.items()}
        out: dict[str, torch.Tensor] = {}
        rest = iter(tensors)
        for group in self.groups:
            found = {pattern: next(rest) for pattern in group.names}
            if group.converter is None:
                out[group.target] = torch.stack(list(found.popitem()[1]))
                continue
            inputs: Mapping[str, Sequence[torch.Tensor]] = (
                found if group.per_expert else {pattern: [torch.stack(list(rows))] for pattern, rows in found.items()}
            )
            out |= run_converter(group.converter, inputs, group.target, self.model, shapes)
        return out


def _random(kind: Kind, generator: torch.Generator) -> torch.Tensor:
    nbytes = torch.Size(kind.shape).numel() * kind.dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(kind.dtype).view(kind.shape)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bits: the made-up values contain NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))

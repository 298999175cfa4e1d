"""Conversions that are more than copies of blocks: on one expert they give what stock gives, or they are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.core_model_loading import Concatenate, ConversionOps, Interleave, MergeModulelist, Transpose

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.catalog.convert import Block, ExpertConversion, blocks_of, blocks_of_share, destinations_of
from offmoe.hf.catalog.groups import Group, Share
from offmoe.hf.load.config import build_meta, model_class
from offmoe.hf.upstream import Alternate, WeightConverter, steps
from offmoe.quant.codec import Kind
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, Segment
from tests import tiny

UP, DOWN = "layer.experts.gate_up_proj", "layer.experts.down_proj"


class Reversed(ConversionOps):
    """An operation that mixes experts: it reverses their order."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        ((tensor,),) = input_dict.values()
        return {target_patterns[0]: tensor.flip(0)}


def converter(
    sources: list[str], operations: list[ConversionOps], target: str = "experts.gate_up_proj"
) -> WeightConverter:
    return WeightConverter(source_patterns=sources, target_patterns=target, operations=operations)


def kinds(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Kind, ...]:
    return tuple(Kind(shape, dtype) for shape in shapes)


def conversion(group: Group, shape: tuple[int, ...]) -> ExpertConversion:
    config = AutoConfig.for_model("mixtral", **{**tiny.COMMON, **tiny.CONFIGS["mixtral"]})
    meta = build_meta(config, model_class(config))
    return ExpertConversion(meta, "layer.experts", {"gate_up_proj": shape}, (group,))


def test_operations_that_move_blocks_are_known() -> None:
    ops: list[ConversionOps] = [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2, check_dims=True)]
    assert steps(converter(["a", "b"], ops)) == tuple(ops)
    assert steps(converter(["a"], [Interleave(dim=1)])) is None


def test_merge_and_concatenate_are_blocks() -> None:
    group = Group(UP, converter(["*.w1", "*.w3"], [MergeModulelist(0), Concatenate(1)]), {"*.w1": ["x"], "*.w3": ["y"]})
    group.kinds = kinds((3, 4), (5, 4))
    value = blocks_of(group, (1, 8, 4))
    assert value is not None
    assert value.shape == (1, 8, 4)
    assert value.blocks == (Block(0, (0, 0, 0), (1, 3, 4)), Block(1, (0, 3, 0), (1, 5, 4)))
    assert destinations_of("p", value) == [Destination("p", 0, 0), Destination("p", 0, 3)]


def test_order_is_the_converters_not_the_files() -> None:
    group = Group(UP, converter(["*.b", "*.a"], [MergeModulelist(0), Concatenate(1)]), {"*.a": ["x"], "*.b": ["y"]})
    group.kinds = kinds((3, 4), (5, 4))
    value = blocks_of(group, (1, 8, 4))
    assert value is not None
    assert destinations_of("p", value) == [Destination("p", 0, 5), Destination("p", 0, 0)]


def test_concatenated_then_transposed_is_placed_like_stock() -> None:
    """[E, in, gate] and [E, in, up] in the file, [E, gate + up, in] in the model."""
    made = converter(["*.w1", "*.w3"], [MergeModulelist(0), Concatenate(2), Transpose(1, 2)])
    group = Group(UP, made, {"*.w1": ["x"], "*.w3": ["y"]})
    group.kinds = kinds((4, 3), (4, 5))
    value = blocks_of(group, (1, 8, 4))
    assert value is not None
    parts = destinations_of("gate_up_proj", value)
    assert parts == [Destination("gate_up_proj", 1, 0, True), Destination("gate_up_proj", 1, 3, True)]
    sources = [torch.randn(4, 3), torch.randn(4, 5)]
    segments = [Segment(0, 0, t.nbytes, t.dtype, tuple(t.shape), "") for t in sources]
    layout = ExpertLayout.of({"gate_up_proj": (torch.float32, (8, 4))})
    views = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    raw = [t.view(-1).view(torch.uint8) for t in sources]
    Assembly(destinations=tuple(parts)).place(segments, raw, views, lambda into, source: into.copy_(source))
    stock = conversion(group, (8, 4))(sources)["gate_up_proj"]
    assert torch.equal(views["gate_up_proj"], stock)


@pytest.mark.parametrize(("shape", "transposed"), [((5, 4), True), ((5, 4), False), ((5,), False)])
def test_alternating_rows_are_placed_as_the_operation_gives_them(shape: tuple[int, ...], transposed: bool) -> None:
    """Gate and up apart in a GGUF file, in turns in gpt-oss's parameter; biases too."""
    operation = Alternate(transposed=transposed)
    group = Group(UP, converter(["gate", "up"], [operation]), {"up": ["y"], "gate": ["x"]})
    group.kinds = kinds(shape, shape)
    sources = {"gate": torch.randn(1, *shape), "up": torch.randn(1, *shape)}
    wanted = operation.convert(dict(sources), ["gate", "up"], ["p"])["p"][0]
    value = blocks_of(group, (1, *wanted.shape))
    assert value is not None
    assert value.shape == (1, *wanted.shape)
    parts = destinations_of("p", value)
    assert parts is not None
    assert all(part.step == 2 for part in parts)
    views = {"p": torch.zeros(wanted.shape)}
    for part, name in zip(parts, ("up", "gate"), strict=True):
        part.block(views, shape).copy_(sources[name][0])
    assert torch.equal(views["p"], wanted)


def test_transpose_with_check_depends_on_the_shape() -> None:
    group = Group(UP, converter(["w"], [Transpose(1, 2, check_dims=True)]), {"w": ["x"]})
    as_is, turned = (blocks_of(replace(group, kinds=kinds(shape)), (1, 3, 4)) for shape in ((3, 4), (4, 3)))
    assert as_is is not None
    assert turned is not None
    assert destinations_of("p", as_is) == [Destination("p", 0, 0, False)]
    assert destinations_of("p", turned) == [Destination("p", 1, 0, True)]


@pytest.mark.parametrize(
    "operations",
    [[Interleave(1)], [Transpose(0, 1)], [Concatenate(0)], [Interleave(1), Transpose(1, 2)]],
    ids=["interleave", "swaps experts", "joins experts", "chain"],
)
def test_what_blocks_cannot_say_is_left_to_the_operations(operations: list[ConversionOps]) -> None:
    group = Group(UP, converter(["w"], operations), {"w": ["x"]}, kinds=kinds((6, 4)))
    assert blocks_of(group, (1, 6, 4)) is None


def test_interleaved_expert_is_converted_alone_as_in_its_layer() -> None:
    group = Group(
        UP, converter(["w13"], [Interleave(dim=1)]), {"w13": ["x"]}, kinds=kinds((6, 4), dtype=torch.bfloat16)
    )
    convert = conversion(group, (6, 4))
    assert convert.check() == {"gate_up_proj": torch.bfloat16}
    layer = torch.randn(8, 6, 4)
    stock = Interleave(dim=1).convert({"w13": layer}, ["w13"], ["t"])["t"]
    assert not torch.equal(stock, layer)
    for expert in range(8):
        assert torch.equal(convert([layer[expert]])["gate_up_proj"], stock[expert])


def test_operation_that_mixes_experts_is_refused() -> None:
    group = Group(UP, converter(["w"], [Reversed()]), {"w": ["x"]}, kinds=kinds((6, 4)))
    with pytest.raises(UnsupportedModelError, match="mixes experts in 'gate_up_proj'"):
        conversion(group, (6, 4)).check()


def test_operation_that_fails_on_one_expert_is_refused_with_its_reason() -> None:
    group = Group(UP, converter(["w"], [Interleave(dim=1)]), {"w": ["x"]}, kinds=kinds((5, 4)))
    with pytest.raises(UnsupportedModelError, match=r"layer\.experts.*one expert at a time.*(invalid|shape)"):
        conversion(group, (5, 4)).check()


def test_conversion_to_another_shape_is_an_error() -> None:
    group = Group(UP, converter(["w"], [Interleave(dim=1)]), {"w": ["x"]}, kinds=kinds((6, 4)))
    with pytest.raises(CheckpointError, match=r"\[6, 4\] per expert, the model expects \[4, 6\]"):
        conversion(group, (4, 6)).check()


class Divided(ConversionOps):
    """An operation that deals experts out to its targets, in turn or (as ernie4_5_vl_moe's) in consecutive runs."""

    supports_many_to_many = True

    def __init__(self, runs: bool, dim: int = 1) -> None:
        self.runs, self.dim = runs, dim

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        number = len(target_patterns)
        out = {}
        for i, target in enumerate(target_patterns):
            lists = [list(tensors) for tensors in input_dict.values()]
            size = len(lists[0]) // number
            own = [t[i * size : (i + 1) * size] if self.runs else t[i::number] for t in lists]
            out[target] = torch.cat([torch.stack(t) for t in own], dim=self.dim)
        return out


def shared_group(operation: ConversionOps, number: int) -> tuple[Group, tiny.Model]:
    """The up projections of two modules' experts, from one list."""
    targets = tuple(f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2))
    made = WeightConverter(["*.w1", "*.w3"], [t.removeprefix("model.") for t in targets], [operation])
    config = AutoConfig.for_model("mixtral", **{**tiny.COMMON, **tiny.CONFIGS["mixtral"]})
    meta = build_meta(config, model_class(config))
    share = Share(number, targets)
    of_both = kinds((4, 4), (4, 4), dtype=torch.bfloat16)
    return Group(targets[number], made, {"*.w1": ["x"], "*.w3": ["y"]}, kinds=of_both, share=share), meta


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("dim", "shape"), [(1, (8, 4)), (2, (4, 8))])
def test_share_of_a_divided_list_is_blocks(number: int, dim: int, shape: tuple[int, int]) -> None:
    group, meta = shared_group(Divided(runs=True, dim=dim), number)
    value = blocks_of_share(group, shape, meta)
    assert value.shape == (1, *shape)
    assert destinations_of("p", value) == [Destination("p", dim - 1, 0), Destination("p", dim - 1, 4)]


def test_list_divided_otherwise_is_refused() -> None:
    group, meta = shared_group(Divided(runs=False), 1)
    with pytest.raises(UnsupportedModelError, match=r"one expert at a time \(an expert is not made of its own tensors"):
        blocks_of_share(group, (8, 4), meta)


def test_division_that_fails_is_refused_with_its_reason() -> None:
    group, meta = shared_group(Divided(runs=True), 0)
    with pytest.raises(UnsupportedModelError, match=r"one expert at a time.*Sizes of tensors"):
        blocks_of_share(replace(group, kinds=kinds((4, 4), (4, 5), dtype=torch.bfloat16)), (8, 4), meta)

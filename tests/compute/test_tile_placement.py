"""Experts put into slots for the C kernels piece by piece stand there as if they had been put there whole."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offmoe
from offmoe.budget.inspect import Inspected, inspect
from offmoe.compute.kernels.cpu import PreparedExpert
from offmoe.compute.kernels.expert_halves import ExpertHalves
from offmoe.compute.kernels.place import Placing
from offmoe.config import OffloadConfig
from offmoe.device.backend import copy_in_ram
from offmoe.errors import CheckpointError
from offmoe.pack.pack import pack, weight_format
from offmoe.storage.layout import Segment
from offmoe.storage.store import ExpertStore
from offmoe.transfer.arrival import Arrival
from offmoe.types import ExpertKey
from tests import gguf_models, native, quantized, tiny
from tests.gguf_models import Q, all_of, q4_k_m
from tests.test_numeric import SIZES, dense, groups_of_32  # noqa: F401

pytestmark = [native.installed, pytest.mark.usefixtures("groups_of_32")]

BY_ROWS, WHOLE = True, False
"""Whether the words of the matrices are put into slots by rows."""


def published(kind: str, family: str = "mixtral") -> Callable[[Path], Path]:
    own: dict[str, Any] = {"moe_intermediate_size": 64} if "moe_intermediate_size" in tiny.CONFIGS[family] else {}
    return lambda folder: quantized.save(folder, family, kind, **SIZES, **own)[0]


def packed(*how: Any, layout: str = "rows") -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        pack(dense(folder, "mixtral"), folder / "packed", weight_format(*how), layout=layout)
        return folder / "packed"

    return save


def gguf(kinds: Any, family: str = "mixtral", **options: Any) -> Callable[[Path], Path]:
    return lambda folder: gguf_models.save(folder, family, kinds, **options).file


CASES: dict[str, tuple[Callable[[Path], Path], bool]] = {
    "ct-int4": (published("ct-int4"), BY_ROWS),
    "ct-int4, other names": (published("ct-int4", "qwen3_moe"), BY_ROWS),
    "ct-int4-asym": (published("ct-int4-asym"), BY_ROWS),
    "ct-int8": (published("ct-int8"), BY_ROWS),
    "mxfp4": (published("mxfp4", "gpt_oss"), BY_ROWS),
    "fp8": (published("fp8"), BY_ROWS),
    "fp8-rows": (published("fp8-rows"), BY_ROWS),
    "awq": (published("awq"), WHOLE),
    "gptq": (published("gptq"), WHOLE),
    "int4": (packed("int4", 64, False), BY_ROWS),
    "int4 with zeros": (packed("int4", 32, True), BY_ROWS),
    "int8": (packed("int8", None, False), BY_ROWS),
    "Q8_0": (gguf(all_of(Q.Q8_0)), BY_ROWS),
    "Q8_0, fused": (gguf(all_of(Q.Q8_0), fused=True), BY_ROWS),
    "Q4_K_M": (gguf(q4_k_m, wide=True), BY_ROWS),
    "MXFP4": (gguf(all_of(Q.MXFP4)), BY_ROWS),
    "Q8_0 with biases": (gguf(all_of(Q.Q8_0), "gpt_oss"), BY_ROWS),
    "BF16 with biases": (gguf(all_of(Q.BF16), "gpt_oss"), BY_ROWS),
    "inputs first, gate and up by turns": (lambda folder: dense(folder, "gpt_oss"), WHOLE),
}

IN_ONE_CALL = {"ct-int4", "ct-int4, other names", "ct-int8", "fp8-rows", "int4", "int8"}
IN_ONE_CALL |= {"Q8_0", "Q8_0, fused", "Q4_K_M", "MXFP4"}
"""Cases of which nothing is computed or copied before it is put into tiles."""


def inspected(path: Path) -> Inspected:
    return inspect(path, OffloadConfig(device="cpu", slots_per_layer=3, exactness="numeric"), dtype=torch.float32)


def bytes_of(segment: Segment, shards: Sequence[Path]) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(shards[segment.shard], np.uint8, segment.nbytes, offset=segment.offset))


@pytest.mark.parametrize("case", CASES)
def test_pieces_in_any_order_fill_a_slot_as_the_whole_does(tmp_path: Path, case: str) -> None:
    save, by_rows = CASES[case]
    found, choose = inspected(save(tmp_path)), random.Random(0)
    for layer in found.catalog.layers:
        segments = layer.records[1].segments
        data = [bytes_of(segment, found.checkpoint.shards) for segment in segments]
        whole, slot = (torch.full((layer.layout.nbytes,), 255, dtype=torch.uint8) for _ in range(2))
        layer.assembly.place(segments, data, layer.layout.views(whole), copy_in_ram)
        runs, units, is_all = layer.assembly.early(segments, layer.layout.views(slot), in_parts=True)
        assert is_all
        assert runs == [None] * len(segments)
        assert any(u is not None and u.nbytes < s.nbytes for u, s in zip(units, segments, strict=True)) == by_rows
        arrival, pieces = Arrival(), []
        for i, segment in enumerate(segments):
            cuts = sorted({0, segment.nbytes, *(choose.randrange(segment.nbytes) for _ in range(7))})
            pieces += [(i, start, end) for start, end in pairwise(cuts)]
        choose.shuffle(pieces)
        for i, start, end in pieces:
            if (of_segment := units[i]) is not None:
                assert segments[i].nbytes % of_segment.nbytes == 0
                first, last = arrival.whole_units(i, start, end, of_segment.nbytes)
                if first < last:
                    of_segment.put(first, data[i][first:last], copy_in_ram)
        assert torch.equal(slot, whole)


@pytest.mark.parametrize("case", CASES)
def test_a_second_expert_is_put_as_the_first_one_showed(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, calls = inspected(CASES[case][0](tmp_path)), list[Placing]()
    call = Placing.__call__

    def counted(self: Placing, *rest: Any) -> None:
        calls.append(self)
        call(self, *rest)

    monkeypatch.setattr(Placing, "__call__", counted)
    for layer in found.catalog.layers:
        calls.clear()
        for expert in range(2):
            segments = layer.records[expert].segments
            data = [bytes_of(segment, found.checkpoint.shards) for segment in segments]
            slot, by_steps = (torch.zeros(layer.layout.nbytes, dtype=torch.uint8) for _ in range(2))
            layer.assembly.place(segments, data, layer.layout.views(slot), copy_in_ram)
            units = layer.assembly.early(segments, layer.layout.views(by_steps), in_parts=True).units
            for of_segment, raw in zip(units, data, strict=True):
                if of_segment is not None:
                    of_segment.put(0, raw, copy_in_ram)
            assert slot.any()
            assert torch.equal(slot, by_steps)
        assert len(calls) == (2 if case in IN_ONE_CALL else 0)
        assert len(set(calls)) <= 1


def test_an_expert_that_is_read_in_one_part_is_put_whole(tmp_path: Path) -> None:
    (layer, *_) = inspected(packed("int4", 64, False)(tmp_path)).catalog.layers
    views = layer.layout.views(torch.empty(layer.layout.nbytes, dtype=torch.uint8))
    assert layer.assembly.early(layer.records[0].segments, views, in_parts=False).units == [None] * 6


@pytest.mark.parametrize("case", ["ct-int4", "ct-int4-asym", "mxfp4", "fp8", "awq", "Q4_K_M", "Q8_0, fused", "int8"])
@pytest.mark.parametrize("prefetch", ["auto", 2])
def test_experts_read_in_many_parts_compute_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, prefetch: str | int
) -> None:
    path, found, halves = CASES[case][0](tmp_path), [], list[torch.Tensor]()
    first = ExpertHalves.first

    def counted(self: ExpertHalves, expert: PreparedExpert, x: torch.Tensor) -> torch.Tensor:
        halves.append(x)
        return first(self, expert, x)

    monkeypatch.setattr(ExpertHalves, "first", counted)
    for part_bytes in (lambda nbytes: nbytes, lambda nbytes: 4096):
        assert not halves
        monkeypatch.setattr("offmoe.storage.read_plan.part_bytes", part_bytes)
        options: dict[str, Any] = {"slots_per_layer": 3, "exactness": "numeric", "prefetch": prefetch}
        model = offmoe.from_pretrained(path, device="cpu", **options)
        with model.offload, torch.no_grad():
            inputs = (*torch.arange(24).view(6, 1, 4), *torch.arange(24, 32).view(8, 1, 1))
            found.append([model(input_ids=ids).logits for ids in inputs])
    assert halves
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_error_of_one_part_ends_the_wait_for_the_first_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.storage.read_plan.part_bytes", lambda nbytes: 4096)
    read_part, failing = ExpertStore.read_part, [False]

    def read(self: ExpertStore, key: ExpertKey, part: int, *rest: Any) -> None:
        if failing[0] and part == 1:
            raise CheckpointError("damaged")
        read_part(self, key, part, *rest)

    monkeypatch.setattr(ExpertStore, "read_part", read)
    path = packed("int4", 64, False)(tmp_path)
    model = offmoe.from_pretrained(path, device="cpu", slots_per_layer=2, exactness="numeric", prefetch=0)
    with model.offload, torch.no_grad():
        ids = torch.tensor([[3]])
        wanted = model(input_ids=ids).logits
        failing[0] = True
        with pytest.raises(CheckpointError, match="damaged"):
            deque((model(input_ids=torch.tensor([[token]])) for token in range(40)), maxlen=0)
        failing[0] = False
        assert torch.equal(model(input_ids=ids).logits, wanted)


def test_an_index_that_the_config_denies_is_found_in_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.storage.read_plan.part_bytes", lambda nbytes: 4096)
    folder = published("gptq")(tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.g_idx"
    tiny.edit(folder, {name.format(e): torch.arange(64, dtype=torch.int32).flip(0) // 32 for e in range(8)})
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, exactness="numeric")
    with model.offload, torch.no_grad(), pytest.raises(CheckpointError, match="not in the order of their groups"):
        model(input_ids=torch.tensor([[3]]))

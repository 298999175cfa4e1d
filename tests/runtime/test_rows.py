"""Every expert gets its own rows in the order of stock transformers, and all outputs leave in router order."""

from __future__ import annotations

import pytest
import torch

from offmoe.compute.expert_layer import TokenOrder
from offmoe.runtime.rows import ExpertOutputs, layer_input
from offmoe.types import count_demands

EXPERTS = 5


@pytest.mark.parametrize("order", TokenOrder)
@pytest.mark.parametrize("own_inputs", [False, True])
def test_rows_go_to_their_experts_and_come_back(order: TokenOrder, own_inputs: bool) -> None:
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(EXPERTS + 2)[:3] - 1 for _ in range(9)])  # -1 and EXPERTS are no experts
    hidden = torch.randn(27 if own_inputs else 9, 4)
    demands, _ = count_demands(ids.numpy(), EXPERTS)
    inputs = layer_input(hidden, ids, ids.numpy(), demands, order)
    outputs = ExpertOutputs(inputs, ids.numel())
    for demand in demands[:3]:
        rows = inputs.rows(demand.expert)
        assert len(rows) == inputs.num_rows(demand.expert) == demand.tokens
        outputs.add([(demand.expert, 0)], rows * (demand.expert + 1))
    together = [(demand.expert, 0) for demand in demands[3:]]
    outputs.add(together, torch.cat([inputs.rows(expert) * (expert + 1) for expert, _ in together]))
    per_pair = hidden if own_inputs else hidden.repeat_interleave(3, dim=0)  # [T * k, H]
    factors = torch.where((ids < 0) | (ids >= EXPERTS), 0, ids + 1).reshape(-1, 1)
    assert torch.equal(outputs.in_router_order(), per_pair * factors)


def test_an_expert_sees_first_choices_before_second_ones() -> None:
    ids = torch.tensor([[1, 0], [0, 1], [0, 2]])
    demands, _ = count_demands(ids.numpy(), 3)
    inputs = layer_input(torch.zeros(3, 2), ids, ids.numpy(), demands, TokenOrder.CHOICES_FIRST)
    assert inputs.pairs is not None
    assert {expert: pairs.tolist() for expert, pairs in inputs.pairs.items()} == {0: [2, 4, 1], 1: [0, 3], 2: [5]}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("routed", [[2, 0], [2, 7, 0], [0, 2, 0]], ids=["plain", "7 is no expert", "twice"])
def test_one_token(routed: list[int], together: bool) -> None:
    ids = torch.tensor([routed])
    demands, _ = count_demands(ids.numpy(), EXPERTS)
    hidden = torch.ones(1, 2, dtype=torch.bfloat16)
    inputs = layer_input(hidden, ids, ids.numpy(), demands, TokenOrder.SORTED_IDS)
    outputs = ExpertOutputs(inputs, ids.numel())
    if together:
        experts = inputs.in_router_order([(0, 8), (2, 9)])
        assert [expert for expert, _ in experts] == list(dict.fromkeys(e for e in routed if e < EXPERTS))
        assert dict(experts) == {0: 8, 2: 9}
        outputs.add(experts, torch.tensor([[e + 1.0] * 2 for e, _ in experts]))
    else:
        for expert in (0, 2):
            outputs.add([(expert, 0)], torch.full((1, 2), expert + 1.0))
    rows = outputs.in_router_order()
    assert rows.dtype == torch.bfloat16
    assert rows.tolist() == [[0 if e >= EXPERTS else e + 1] * 2 for e in routed]


def test_several_rows_have_no_router_order() -> None:
    ids = torch.tensor([[1, 0], [0, 1]])
    demands, _ = count_demands(ids.numpy(), EXPERTS)
    inputs = layer_input(torch.ones(2, 2), ids, ids.numpy(), demands, TokenOrder.SORTED_IDS)
    assert inputs.in_router_order([(0, 1), (1, 0)]) == [(0, 1), (1, 0)]

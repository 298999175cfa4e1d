"""Every expert gets its own rows in the order of stock transformers, and all outputs leave in router order."""

from __future__ import annotations

import numpy as np
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
    inputs = layer_input(hidden, ids, demands, order)
    outputs = ExpertOutputs(inputs, ids.numpy())
    for demand in demands:
        rows = inputs.rows(demand.expert)
        assert len(rows) == inputs.num_rows(demand.expert) == demand.tokens
        outputs.add(demand.expert, rows * (demand.expert + 1))
    per_pair = hidden if own_inputs else hidden.repeat_interleave(3, dim=0)  # [T * k, H]
    factors = torch.where((ids < 0) | (ids >= EXPERTS), 0, ids + 1).reshape(-1, 1)
    assert torch.equal(outputs.in_router_order(), per_pair * factors)


def test_an_expert_sees_first_choices_before_second_ones() -> None:
    ids = torch.tensor([[1, 0], [0, 1], [0, 2]])
    demands, _ = count_demands(ids.numpy(), 3)
    inputs = layer_input(torch.zeros(3, 2), ids, demands, TokenOrder.CHOICES_FIRST)
    assert inputs.pairs is not None
    assert {expert: pairs.tolist() for expert, pairs in inputs.pairs.items()} == {0: [2, 4, 1], 1: [0, 3], 2: [5]}


def test_one_token() -> None:
    ids = torch.tensor([[2, 7, 0]])  # 7 is no expert
    demands, _ = count_demands(ids.numpy(), EXPERTS)
    inputs = layer_input(torch.ones(1, 2, dtype=torch.bfloat16), ids, demands, TokenOrder.SORTED_IDS)
    outputs = ExpertOutputs(inputs, np.array([[2, 7, 0]]))
    for expert in (0, 2):
        outputs.add(expert, torch.full((1, 2), expert + 1.0))
    rows = outputs.in_router_order()
    assert rows.dtype == torch.bfloat16
    assert rows.tolist() == [[3, 3], [0, 0], [1, 1]]

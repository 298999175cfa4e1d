"""Plain routers by the C kernels choose as their own code does, and all other calls are their own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import offmoe
from offmoe.compute.dense_linear import DenseKernels
from offmoe.compute.kernels.cpu import CpuKernels
from offmoe.compute.kernels.library import status
from offmoe.hf.load.kernel_routers import SELECTIONS, RouterForward, attach_routers
from offmoe.hf.upstream import plain_routers
from tests import families, tiny

HIDDEN, EXPERTS = 64, 24
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN,
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    n_routed_experts=EXPERTS,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
PLAIN = ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "gpt_oss", "deepseek_v3", "dots1", "olmoe", "glm4_moe"]
OTHER = ["ernie4_5_moe", "phimoe", "deepseek_v2"]


@pytest.fixture
def owner() -> Iterator[DenseKernels]:
    library = status().library
    if library is None:
        pytest.skip(status().message)
    kernels = DenseKernels(CpuKernels(library, 2))
    yield kernels
    kernels.close()


def router(cls: type[nn.Module], owner: DenseKernels) -> Any:
    """A router with random weights that the kernels compute."""
    module: Any = cls(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    module.weight.data = torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16()
    for name in ("bias", "e_score_correction_bias"):
        if (tensor := getattr(module, name, None)) is not None:
            tensor.data = torch.randn(EXPERTS, generator=generator).to(tensor.dtype) / 4
    if getattr(module, "bias", None) is not None:
        module.bias.data = module.bias.data.bfloat16()
    assert attach_routers(module, owner) == 1
    return module


def inputs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, HIDDEN, generator=generator).bfloat16() / 4 for _ in range(count)]


def agree(found: tuple[torch.Tensor, ...], own: tuple[torch.Tensor, ...]) -> bool:
    """Whether two results are the same but for rounding and the order of the experts. False for a near tie."""
    (logits, scores, ids), (own_logits, own_scores, own_ids) = found, own
    dtypes = [(a.dtype, a.shape) for a in found], [(a.dtype, a.shape) for a in own]
    assert dtypes[0] == dtypes[1]
    torch.testing.assert_close(logits, own_logits, rtol=2**-7, atol=2e-3)
    if sorted(ids[0].tolist()) != sorted(own_ids[0].tolist()):
        return False
    order, own_order = ids[0].argsort(), own_ids[0].argsort()
    torch.testing.assert_close(scores[0, order], own_scores[0, own_order], rtol=2**-5, atol=2e-3)
    return True


@pytest.mark.parametrize(("name", "cls"), plain_routers())
def test_known_routers_choose_as_their_own_code(name: str, cls: type[nn.Module], owner: DenseKernels) -> None:
    module = router(cls, owner)
    agreed = [agree(module(x), cls.forward(module, x)) for x in inputs(40)]
    assert module.__dict__["forward"]._router is not None
    assert sum(agreed) >= 38, "a tie in bf16 may fall either way"
    assert set(SELECTIONS) == {name for name, _ in plain_routers()}


@pytest.mark.parametrize(("name", "cls"), plain_routers())
def test_whatever_else_is_asked_is_their_own_code(name: str, cls: type[nn.Module], owner: DenseKernels) -> None:
    module = router(cls, owner)
    forward = module.__dict__["forward"]
    others = [torch.cat(inputs(3)), torch.cat(inputs(2), 1)[:, ::2]]
    if name != "sigmoid in groups":
        others.append(inputs(1)[0][None])
    for x in others:
        found, own = module(x), cls.forward(module, x)
        assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))
        assert forward._router is None
    if name == "sigmoid in groups":
        assert agree(module(inputs(1)[0][None]), cls.forward(module, inputs(1)[0][None]))
        assert forward._router is not None


def changed(how: str) -> Callable[[Any], None]:
    def in_place(module: Any) -> None:
        module.weight.data = -module.weight.data

    def values(module: Any) -> None:
        with torch.no_grad():
            module.weight.mul_(-1)

    def another(module: Any) -> None:
        module.weight = nn.Parameter(-module.weight.detach(), requires_grad=False)

    def fewer(module: Any) -> None:
        module.top_k = 2

    return {"memory": in_place, "values": values, "parameter": another, "attribute": fewer}[how]


@pytest.mark.parametrize("how", ["memory", "values", "parameter", "attribute"])
@pytest.mark.parametrize(("name", "cls"), plain_routers())
def test_a_change_is_seen(name: str, cls: type[nn.Module], how: str, owner: DenseKernels) -> None:
    module, x = router(cls, owner), inputs(1)[0]
    before = module(x)
    changed(how)(module)
    after = module(x)
    if how == "attribute":
        assert (before[2].shape[1], after[2].shape[1]) == (4, 2)
    else:
        assert not torch.equal(before[0], after[0])
    assert agree(after, cls.forward(module, x))


def test_after_the_threads_ended_their_own_code_runs(owner: DenseKernels) -> None:
    cls = dict(plain_routers())["softmax"]
    module, x = router(cls, owner), inputs(1)[0]
    owner.close()
    assert all(torch.equal(a, b) for a, b in zip(module(x), cls.forward(module, x), strict=True))


@pytest.mark.parametrize("family", PLAIN + OTHER)
def test_which_families_have_them(family: str, tmp_path: Path) -> None:
    if status().library is None:
        pytest.skip(status().message)
    values = {**tiny.COMMON, **families.CONFIGS[family]}
    model_type = values.pop("model_type", family)
    tiny.save(tiny.random_model(AutoConfig.for_model(model_type, **values), torch.bfloat16), tmp_path / family)
    for exactness in ("bitwise", "numeric"):
        model: Any = offmoe.from_pretrained(tmp_path / family, device="cpu", exactness=exactness)
        with model.offload:
            forwards = [m.__dict__.get("forward") for m in model.modules()]
            found = sum(isinstance(forward, RouterForward) for forward in forwards)
            assert (found > 0) == (exactness == "numeric" and family in PLAIN)

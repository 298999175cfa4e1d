"""Which attention modules compute single tokens by the C kernels, and that all other calls are their own code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, StaticCache

import offmoe
from offmoe.compute.kernels.cpu import CpuKernels
from offmoe.compute.kernels.library import status
from offmoe.compute.kernels.token_attention import Norm, TokenAttention
from offmoe.hf.load.kernel_norms import NormForward, known_norm
from offmoe.hf.load.token_attention import COMPARED, TokenForward
from tests import families, tiny

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
PLAIN = ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "dots1", "phimoe"]
OTHER = ["ernie4_5_moe", "gpt_oss", "deepseek_v3", "olmoe", "glm4_moe", "llama4_text"]


@pytest.fixture(autouse=True)
def kernels() -> None:
    if status().library is None:
        pytest.skip(status().message)


@contextmanager
def loaded(folder: Path, family: str, slots: int = 3, **options: Any) -> Iterator[Any]:
    if not (folder / family).exists():
        values = {**tiny.COMMON, **families.CONFIGS[family], **(SIZES if family in PLAIN else {})}
        model_type = values.pop("model_type", family)
        tiny.save(tiny.random_model(AutoConfig.for_model(model_type, **values), torch.bfloat16), folder / family)
    model: Any = offmoe.from_pretrained(
        folder / family, device="cpu", slots_per_layer=slots, exactness="numeric", **options
    )
    with model.offload, torch.no_grad():
        yield model


def attention_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module.__dict__.get("forward"), TokenForward)]


def decode(model: Any, tokens: int = 6, prompt: int = 5) -> torch.Tensor:
    """Logits of tokens after a prompt, each given."""
    ids = tiny.prompt(1, prompt + tokens)
    out = model(ids[:, :prompt], use_cache=True)
    logits = []
    for at in range(prompt, prompt + tokens):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1).float()


@contextmanager
def by_their_own_code(model: Any) -> Iterator[None]:
    """Modules whose single tokens the kernels compute run the code of their class meanwhile."""
    forwards = {module: module.__dict__.pop("forward") for module in attention_modules(model)}
    yield
    for module, forward in forwards.items():
        object.__setattr__(module, "forward", forward)


@pytest.mark.parametrize("family", PLAIN)
def test_tokens_are_those_of_the_modules_own_code(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(tmp_path, family) as model:
        modules = attention_modules(model)
        assert len(modules) == model.config.num_hidden_layers
        with by_their_own_code(model):
            wanted = decode(model)
        decode(model)  # compares
        assert not any(module.forward._trial.left or module.forward._trial.differs for module in modules)
        calls = counted(monkeypatch, type(modules[0]))
        found = decode(model)
        assert calls == [5] * len(modules)  # the prompt
        assert (found - wanted).norm() <= 0.1 * wanted.norm()  # routing follows the last bits


def counted(monkeypatch: pytest.MonkeyPatch, cls: type[nn.Module]) -> list[int]:
    """The tokens of every call of a class's own code from now on."""
    calls: list[int] = []
    own: Callable[..., Any] = cls.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(hidden_states.shape[1])
        return own(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(cls, "forward", forward)
    return calls


@pytest.mark.parametrize("family", OTHER)
def test_other_code_stays(tmp_path: Path, family: str) -> None:
    with loaded(tmp_path, family) as model:
        assert not attention_modules(model)
        decode(model, 2)


def test_what_is_compared_shows_in_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens run both ways, and give what later ones of the same prompt give."""
    with loaded(tmp_path, "qwen3_moe") as model:
        modules = attention_modules(model)
        calls = counted(monkeypatch, type(modules[0]))
        first = decode(model, 3)
        assert calls == [5] * len(modules) + [1] * COMPARED
        assert torch.equal(decode(model, 3), first)


def test_a_difference_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attend = TokenAttention.attend
    monkeypatch.setattr(TokenAttention, "attend", lambda *arguments: attend(*arguments) * 1.1)
    with loaded(tmp_path, "qwen3_moe") as model, caplog.at_level(logging.WARNING):
        with by_their_own_code(model):
            wanted = decode(model)
        assert torch.equal(decode(model), wanted)
    assert caplog.text.count("is computed by transformers' code") == 1


def replaced(model: Any) -> None:
    """Another layer in the place of a projection, as adapters put one there."""
    for module in attention_modules(model):
        module.q_proj = nn.Sequential(module.q_proj)


def hooked(model: Any) -> None:
    for module in attention_modules(model):
        module.v_proj.register_forward_hook(lambda *_: None)


def changed(model: Any) -> None:
    for module in attention_modules(model):
        module.k_norm.weight = nn.Parameter(module.k_norm.weight * 2, requires_grad=False)


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [replaced, hooked, changed, eager])
def test_what_changes_a_module_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    with loaded(tmp_path, "qwen3_moe") as model:
        decode(model)
        modules = attention_modules(model)
        change(model)
        calls = counted(monkeypatch, type(modules[0]))
        decode(model, 2)
        assert calls == [5] * len(modules) + [1] * 2 * len(modules)


def test_masks_static_caches_and_several_tokens_are_the_modules_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(tmp_path, "qwen3_moe") as model:
        decode(model)
        calls = counted(monkeypatch, type(attention_modules(model)[0]))
        ids = tiny.prompt(2, 4)
        greedy = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
        for options in (
            {"input_ids": ids},
            {"input_ids": ids[:1], "attention_mask": torch.tensor([[0, 1, 1, 1]])},
            {"input_ids": ids[:1], "past_key_values": StaticCache(config=model.config, max_cache_len=8)},
        ):
            calls.clear()
            model.generate(**options, **greedy)
            assert calls.count(1) == 2 * model.config.num_hidden_layers


def test_generations_of_any_kind_run(tmp_path: Path) -> None:
    """Greedy with the cache, and without it, give the same tokens up to rounding; beams and caches of windows run."""
    with loaded(tmp_path, "mixtral", sliding_window=4) as model:
        ids = tiny.prompt(1, 6)
        greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        with by_their_own_code(model):
            wanted = model.generate(ids, **greedy)
        assert torch.equal(model.generate(ids, **greedy), wanted)
        assert model.generate(ids, num_beams=2, **greedy).shape == wanted.shape
        assert model.generate(ids, use_cache=False, **greedy).shape == wanted.shape


KINDS = {"qwen3_moe": Norm.ROUNDS_TWICE, "gpt_oss": Norm.ROUNDS_ONCE, "qwen3_next": Norm.OF_ONE_MORE}


@pytest.mark.parametrize("family", KINDS)
def test_norms_are_known_by_what_they_compute(tmp_path: Path, family: str) -> None:
    library = status().library
    assert library is not None
    with loaded(tmp_path, family) as model, CpuKernels(library, 1) as calls:
        norms = {m: m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), NormForward)}
        assert len(norms) >= 2 * model.config.num_hidden_layers
        for module, forward in norms.items():
            del module.__dict__["forward"]
            module.weight.data = torch.randn(module.weight.shape).bfloat16()
            known = known_norm(module, calls)
            assert known is not None
            assert known.kind == KINDS[family]
            x = torch.randn(2, 3, len(module.weight)).bfloat16()
            torch.testing.assert_close(forward(x), module(x), rtol=2**-7, atol=0)
            long = torch.randn(1 << 17).bfloat16().view(-1, len(module.weight))
            assert torch.equal(forward(long), module(long))
            assert torch.equal(forward(x.float()), module(x.float()))

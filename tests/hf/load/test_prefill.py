"""A prompt in chunks gives the bits of stock's generate(prefill_chunk_size=...), and nothing exceeds the workspace."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, ConfigError
from offmoe.hf.load.config import model_class, read_config
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from tests import families, tiny

CHUNK, NEW_TOKENS = 4, 5
FAMILIES = (
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "olmoe"),
    *("llama4_text", "granitemoehybrid", "qwen3_next", "jamba", "lfm2_moe", "nemotron_h", "gemma4_text"),
)
LOGGER = "offmoe.hf.load.prefill"


def build(family: str) -> tiny.Model:
    changes = {"sliding_window": 6} if family == "gpt_oss" else {}
    dtype = torch.bfloat16  # of gpt_oss in float32, stock's own implementations differ (docs/families.md)
    return tiny.build(family, dtype, **changes) if family in tiny.CONFIGS else families.build(family, dtype)


def stock_of(folder: Path) -> tiny.Model:
    return tiny.comparable(model_class(read_config(folder)).from_pretrained(folder, dtype="auto"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path / "model")


def padded() -> dict[str, torch.Tensor]:
    """Two sequences of 11 tokens; 5 of the first are padding, so that a chunk of it is padding alone."""
    ids = tiny.prompt()
    ids[0, :5] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(model: tiny.Model, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [sequences, length] and logits [steps, sequences, vocabulary] of a greedy generation."""
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **{**settings, **options})
    return out.sequences, torch.stack(out.logits)


@contextmanager
def lengths(model: tiny.Model) -> Iterator[list[int]]:
    """The tokens per sequence of every forward pass in this context."""
    seen: list[int] = []

    def note(_: object, __: object, kwargs: dict[str, Any], ___: object) -> None:
        seen.append(kwargs["input_ids"].shape[1])

    hook = model.get_decoder().register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def assert_same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(b.float()).all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_stocks_chunks(tmp_path: Path, family: str) -> None:
    folder = tiny.save(build(family), tmp_path / "model")
    stock, path = stock_of(folder), tmp_path / "t.npz"
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefill_chunk=CHUNK, trace=path)
    inputs = {"input_ids": tiny.prompt(1)}
    with model.offload:
        with lengths(model) as passed:
            ours = generate(model, inputs)
        assert passed == [CHUNK, CHUNK, 3, *[1] * (NEW_TOKENS - 1)]
        assert_same(ours, generate(stock, inputs, prefill_chunk_size=CHUNK))
        assert_same(generate(model, padded()), generate(stock, padded(), prefill_chunk_size=CHUNK))
        beams = {"num_beams": 2, "num_return_sequences": 2}
        assert_same(generate(model, padded(), **beams), generate(stock, padded(), prefill_chunk_size=CHUNK, **beams))
    trace = read_trace(path)
    assert trace.options is not None
    assert replay(trace, trace.options).stats == model.offload.stats()


def test_a_prompt_that_fits_is_whole(folder: Path) -> None:
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    with model.offload:
        assert model.offload.config.prefill_chunk == 512, "the model's limit"
        with lengths(model) as passed:
            ours = generate(model, padded())
        assert passed[0] == 11
        assert_same(ours, generate(stock_of(folder), padded()))


@pytest.mark.parametrize("how", ["argument", "settings", "model"])
def test_a_chunk_size_given_to_generate_wins(folder: Path, how: str) -> None:
    stock = stock_of(folder)
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefill_chunk=5)
    given: dict[str, Any] = {"prefill_chunk_size": 3} if how == "argument" else {}
    if how == "settings":
        given = {"generation_config": GenerationConfig(prefill_chunk_size=3, pad_token_id=0)}
    if how == "model":
        model.generation_config.prefill_chunk_size = 3
    with model.offload, lengths(model) as passed:
        ours = generate(model, padded(), **given)
        assert passed[:4] == [3, 3, 3, 2]
        assert_same(ours, generate(stock, padded(), prefill_chunk_size=3))


def test_settings_of_the_caller_stay_as_they_are(folder: Path) -> None:
    settings = GenerationConfig(pad_token_id=0)
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefill_chunk=5)).offload:
        generate(model, padded(), generation_config=settings)
        assert settings.prefill_chunk_size is None
        assert model.generation_config.prefill_chunk_size is None


def test_a_conversation_goes_on_in_chunks(folder: Path) -> None:
    """The second call brings a cache of the first, with all ids or with the new ones."""
    stock = stock_of(folder)
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefill_chunk=5)).offload:
        found, passes = {}, {}
        for name, one, options in (("ours", model, {}), ("stock", stock, {"prefill_chunk_size": 5})):
            first = one.generate(
                tiny.prompt(1), do_sample=False, max_new_tokens=3, return_dict_in_generate=True, **options
            )
            longer = torch.cat([first.sequences, tiny.prompt(1, 12, seed=9)], dim=1)
            again = {"input_ids": longer, "past_key_values": first.past_key_values}
            with lengths(one) as passed:
                found[name] = generate(one, again, **options)
            passes[name] = passed
        assert_same(found["ours"], found["stock"])
        assert passes["ours"] == passes["stock"]
        assert passes["ours"][:3] == [5, 5, 3]


def test_what_transformers_cannot_divide_passes_whole(folder: Path, tmp_path: Path) -> None:
    stock = stock_of(folder)
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefill_chunk=CHUNK)).offload:
        ids = tiny.prompt(1)
        with pytest.raises(ValueError, match="without a cache"):
            generate(stock, {"input_ids": ids}, use_cache=False, prefill_chunk_size=CHUNK)
        for inputs, options in (
            ({"input_ids": ids}, {"use_cache": False}),
            ({"inputs_embeds": stock.get_input_embeddings()(ids)}, {}),
            ({"input_ids": ids}, {"prompt_lookup_num_tokens": 2}),
        ):
            assert_same(generate(model, inputs, **options), generate(stock, inputs, **options))
    other = tiny.save(families.build("switch_transformers", torch.bfloat16), tmp_path / "encoder")
    with (model := offmoe.from_pretrained(other, device="cpu", slots_per_layer=3, prefill_chunk=CHUNK)).offload:
        assert_same(generate(model, {"input_ids": ids}), generate(stock_of(other), {"input_ids": ids}))


def test_images_are_encoded_first_and_divided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "offmoe")
    inputs = families.image_inputs("qwen3_vl_moe", torch.bfloat16)
    folder = tiny.save(families.build("qwen3_vl_moe", torch.bfloat16), tmp_path / "model")
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefill_chunk=CHUNK)).offload:
        assert_same(generate(model, inputs), generate(stock_of(folder), inputs, prefill_chunk_size=CHUNK))
    assert f"prefilled in chunks of {CHUNK}" in caplog.text


EAGER: dict[str, Any] = {"device": "cpu", "slots_per_layer": 3, "attn_implementation": "eager"}
"""Attention that takes most: all scores are in memory at once."""


def load_tight(folder: str | Path, max_context: int) -> tiny.Model:
    """A model that has no more memory than its parts take by the plan."""
    with (model := offmoe.from_pretrained(folder, max_context=max_context, **EAGER)).offload:
        used = model.offload.memory().used
    return offmoe.from_pretrained(folder, device_memory=used, max_context=max_context, **EAGER)


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny.Model]:
    """A model whose KV reserve is little more than its longest prompt."""
    folder = tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("tight"))
    yield (model := load_tight(folder, 300))
    model.offload.close()


def test_a_prompt_that_does_not_fit_is_divided_by_what_does(
    tight: tiny.Model, caplog: pytest.LogCaptureFixture
) -> None:
    offload, stock = tight.offload, stock_of(Path(tight.name_or_path))
    stock.set_attn_implementation("eager")
    for batch, length in ((1, 290), (3, 90)):
        chunk = offload.prefill_chunk(batch, length)
        assert 1 < chunk < length
        prompt = {"input_ids": tiny.prompt(batch, length)}
        caplog.clear()
        with caplog.at_level("INFO", LOGGER), lengths(tight) as passed:
            ours = generate(tight, prompt)
        assert f"{batch} x {length} tokens is prefilled in chunks of {chunk}" in caplog.text
        assert passed[0] == chunk
        assert_same(ours, generate(stock, prompt, prefill_chunk_size=chunk))
    whole = next(n for n in range(300, 0, -1) if offload.prefill_chunk(1, n) == n)
    assert 32 < whole < 290
    assert all(offload.prefill_chunk(1, n) == n for n in range(1, whole))
    assert offload.prefill_chunk(1, whole + 1) <= whole


def test_a_pass_that_does_not_fit_is_refused_with_what_would(tight: tiny.Model) -> None:
    ids = tiny.prompt(1, 290)
    with pytest.raises(CapacityError, match="more than the workspace") as refused:
        tight(ids)
    words = str(refused.value).split()
    chunk, context = int(words[words.index("most") + 1]), int(words[-3].removeprefix("max_context="))
    cache: Any = None
    for piece in ids.split(chunk, dim=1):
        cache = tight(piece, past_key_values=cache, use_cache=True).past_key_values
    assert cache.get_seq_length() == 290
    with (model := load_tight(tight.name_or_path, context)).offload:
        model(ids)
    too_small = load_tight(tight.name_or_path, context - 10)
    with too_small.offload, pytest.raises(CapacityError, match=f"max_context={context} or more"):
        too_small(ids)


def test_what_cannot_be_divided_and_does_not_fit_is_refused(tight: tiny.Model) -> None:
    prompt = {"input_ids": tiny.prompt(1, 290)}
    for options in ({"use_cache": False}, {"prefill_chunk_size": 290}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(CapacityError, match="one forward pass"):
            generate(tight, prompt, **options)


def test_a_prompt_beyond_the_context_is_refused_before_its_first_chunk(folder: Path) -> None:
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, max_context=40, prefill_chunk=8)
    with model.offload, lengths(model) as passed:
        with pytest.raises(CapacityError, match="max_context=50"):
            generate(model, {"input_ids": tiny.prompt(1, 50)})
        assert not passed


def test_the_workspace_holds_the_chunks_that_were_asked_for(folder: Path) -> None:
    sizes = [None, 1, 64, 128, 512, 10**6]
    plans = {n: inspect(folder, OffloadConfig(device="cpu", prefill_chunk=n, max_context=512)) for n in sizes}
    workspaces = [plans[n].plan.workspace for n in sizes]
    assert workspaces[0] == workspaces[1] <= workspaces[2] < workspaces[3] < workspaces[4] == workspaces[5]
    assert [plans[n].config.prefill_chunk for n in sizes[1:]] == [1, 64, 128, 512, 512]
    with (model := offmoe.from_pretrained(folder, device="cpu", prefill_chunk=128, max_context=512)).offload:
        assert [model.offload.prefill_chunk(1, 512 - past, past) for past in range(0, 384, 64)] == [128] * 6


def test_what_was_resolved_asks_nothing_of_another_plan(folder: Path) -> None:
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)).offload:
        config = model.offload.config
    assert config.prefill_chunk is not None
    with (again := offmoe.from_pretrained(folder, offload_config=config)).offload:
        assert again.offload.config == config
        plans = [loaded.offload.memory() for loaded in (model, again)]
        assert len({(plan.workspace, plan.max_context, plan.slots_per_layer, plan.budget) for plan in plans}) == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", 2**64])
def test_values_that_are_no_number_of_tokens(value: object) -> None:
    with pytest.raises(ConfigError, match="prefill_chunk"):
        OffloadConfig(prefill_chunk=value)  # type: ignore[arg-type]


def test_any_chunk_size_gives_stocks_bits(folder: Path) -> None:
    stock = stock_of(folder)
    for chunk, length in itertools.product((1, 2, 7, 64), (1, 2, 7, 15)):
        inputs = {"input_ids": tiny.prompt(1, length)}
        with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=2, prefill_chunk=chunk)).offload:
            assert_same(generate(model, inputs), generate(stock, inputs, prefill_chunk_size=chunk))

"""The same tokens as the unmodified model, and a replay that counts what the run counted.

"Stock" is transformers' default implementation, grouped_mm, its weights where and as offmoe has them
(`tiny.comparable`): elsewhere it is not equal to itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import offmoe
from offmoe.compute.kernels import torch_ffn
from offmoe.hf.hub.locate import locate
from offmoe.simulate.replay import replay
from offmoe.storage import read_plan
from offmoe.trace.trace import read_trace
from tests import tiny

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT = (
    "And it came to pass in those days, that there went out a decree, and all went to be taxed, every one into his "
    "own city. "
    "def close(self):\n    if self._file is not None:\n        self._file.close()\n        self._file = None\n\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(locate("demo").folder)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Prompts of 1, 7 and 200 tokens, and a batch of three with padding on the left."""
    ids = tokenizer(TEXT * 4, return_tensors="pt").input_ids
    one = {n: {"input_ids": ids[:, :n], "attention_mask": torch.ones(1, n, dtype=torch.long)} for n in (1, 7, 200)}
    tokenizer.padding_side = "left"
    batch = tokenizer(["In the beginning", "def main():\n    parser =", TEXT], return_tensors="pt", padding=True)
    return {**one, "batch": dict(batch)}


def ways(prompts):
    """Named calls of generate: greedy on every prompt, beams, sampling with a seed."""
    for name, inputs in prompts.items():
        tokens = 64 if name != "batch" else 24
        yield f"greedy {name}", inputs, {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    yield "beams", prompts[7], {"do_sample": False, "num_beams": 3, "max_new_tokens": 16}
    yield "sampling", prompts["batch"], {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_new_tokens": 16}


def run(model, prompts):
    """Logits of every prompt and tokens of every way."""
    with torch.no_grad():
        logits = {name: model(**inputs).logits for name, inputs in prompts.items()}
    tokens = {}
    for name, inputs, options in ways(prompts):
        torch.manual_seed(0)
        tokens[name] = model.generate(**inputs, **options)
    return logits, tokens


@pytest.fixture(scope="module")
def stock(prompts):
    found = {}
    for name, dtype in DTYPES.items():
        model = tiny.comparable(AutoModelForCausalLM.from_pretrained(locate("demo").folder, dtype=dtype))
        found[name] = run(model, prompts)
    return found


def assert_same(ours, theirs):
    for name in theirs[0]:
        assert torch.equal(ours[0][name], theirs[0][name]), f"logits of {name}"
    for name in theirs[1]:
        assert torch.equal(ours[1][name], theirs[1][name]), f"tokens of {name}"


@pytest.mark.parametrize(
    ("slots", "eviction", "dtype", "prefetch", "on_miss"),
    [
        (slots, eviction, dtype, prefetch, on_miss)
        for (slots, eviction, dtype), prefetch, on_miss in zip(
            itertools.product((2, 3, 4, 8), ("aged-lfu", "lru"), DTYPES),
            itertools.cycle(("auto", 0, 1)),
            itertools.cycle(("fetch", "auto", "cpu", "auto", "cpu")),
            strict=False,
        )
    ],
)
def test_demo_equals_stock_bit_for_bit(tmp_path, prompts, stock, slots, eviction, dtype, prefetch, on_miss):
    """Also where experts are computed without a slot, which on a CPU is the same kernel on another buffer.

    "auto" chooses in a pool of all layers only; with quotas it is "fetch"."""
    path = tmp_path / "run.npz"
    model = offmoe.from_pretrained(
        "demo",
        device="cpu",
        slots_per_layer=slots,
        eviction=eviction,
        scope="model" if on_miss == "auto" else "layer",
        prefetch=prefetch,
        on_miss=on_miss,
        dtype=DTYPES[dtype],
        trace=path,
    )
    with model.offload:
        assert_same(run(model, prompts), stock[dtype])
        stats = model.offload.stats()
    assert bool(stats.host_computed) == (on_miss != "fetch" and slots < 8)
    trace = read_trace(path)
    assert replay(trace, trace.options).stats == stats
    assert stats.demands == stats.hits + stats.pending + stats.misses > 0
    assert stats.h2d_bytes == (stats.misses + stats.pending) * 196_608
    assert stats.disk_bytes == (stats.misses + stats.prefetched) * 196_608


@pytest.mark.parametrize(
    ("scope", "slots", "on_miss"),
    [
        *(
            (scope, slots, on_miss)
            for scope in ("layer", "model")
            for slots, on_miss in (((2, 3, 4, 5, 6, 7), "auto"), (3, "fetch"), (3, "cpu"))
        ),
        ("layer", 1, "fetch"),
        ("model", (1, 1, 0, 0, 0, 0), "fetch"),
        ("model", (1, 1, 0, 0, 0, 0), "cpu"),
        ("model", (0, 0, 3, 0, 0, 2), "auto"),
    ],
)
def test_quotas_and_pools_change_nothing_but_counts(tmp_path, prompts, stock, scope, slots, on_miss):
    path = tmp_path / "run.npz"
    model = offmoe.from_pretrained(
        "demo", device="cpu", slots_per_layer=slots, scope=scope, prefetch=2, on_miss=on_miss, trace=path
    )
    with model.offload:
        assert_same(run(model, prompts), stock["bf16"])
        stats = model.offload.stats()
    trace = read_trace(path)
    assert replay(trace, trace.options).stats == stats


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_equal_stock(tmp_path, family, dtype, original_format):
    """Bit for bit, all of them.

    gpt_oss is made with a width that real ones have, a multiple of 32. It activates the rows of an expert as one piece,
    and what torch's vectors of 32 leave at the end of a piece goes through another sigmoid: at a width of 24 that would
    be other elements than in stock, whose piece is the rows of all experts.
    """
    sizes = {"intermediate_size": 32} if family == "gpt_oss" else {}
    folder = tiny.save(tiny.build(family, DTYPES[dtype], **sizes), tmp_path / "model", original_format)
    inputs = {"input_ids": tiny.prompt()}
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    stock = tiny.comparable(
        AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], experts_implementation="grouped_mm")
    )
    ours = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, trace=tmp_path / "run.npz")
    with ours.offload:
        assert type(ours) is type(stock)
        with torch.no_grad():
            assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)
        assert torch.equal(ours.generate(**inputs, **options), stock.generate(**inputs, **options))
        stats = ours.offload.stats()
    trace = read_trace(tmp_path / "run.npz")
    assert replay(trace, trace.options).stats == stats


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_with_several_threads_too(tmp_path, two_threads):
    """Products of several rows differ in the last bits with a row's place among them then: it must be stock's."""
    folder = tmp_path / "model"
    tiny.save(tiny.build("mixtral", torch.bfloat16, hidden_size=1024, intermediate_size=2048), folder)
    stock = tiny.comparable(AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm"))
    ids = torch.randint(3, 90, (1, 61), generator=torch.Generator().manual_seed(1))
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    with model.offload, torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_computing_with_what_is_still_arriving(tmp_path, monkeypatch, architecture, dtype):
    """Experts in parts of a page, blocks as small as they get: the same tokens and bits, and it did happen."""
    monkeypatch.setattr(read_plan, "part_bytes", lambda nbytes: 4096)
    monkeypatch.setattr(torch_ffn, "BLOCK_BYTES", 1)
    sizes = {"hidden_size": 128, "intermediate_size": 192}
    if architecture != "mixtral":
        sizes["moe_intermediate_size"] = 192
    folder = tiny.save(tiny.build(architecture, dtype, **sizes), tmp_path / "model")
    stock = tiny.comparable(
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="grouped_mm")
    )
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    want = stock.generate(input_ids=tiny.prompt(), output_logits=True, **options)
    in_blocks, early = torch_ffn.GatedFFN.as_it_arrives, []
    monkeypatch.setattr(torch_ffn.GatedFFN, "as_it_arrives", lambda *args: early.append(1) or in_blocks(*args))
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefetch=2)
    with model.offload:
        got = model.generate(input_ids=tiny.prompt(), output_logits=True, **options)
    assert len(early) > 1, "the first expert in blocks had the bits of the whole, so others followed"
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))

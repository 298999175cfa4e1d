"""Decoder layers that run as graphs: the tokens of layers that run as they are, and never a wrong row.

The late device records what a thread queues and queues it again. That is what a graph of CUDA does, with the same
rules: addresses and sizes stay, and the host cannot wait in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import offmoe
from offmoe.compute.kernels import device as device_kernels
from offmoe.compute.kernels.routing_log import Entry
from offmoe.errors import CapacityError, CheckpointError, OffmoeError
from offmoe.hf.load.capture import CHECKS
from offmoe.runtime.device_decode import DeviceDecode
from offmoe.simulate.replay import replay
from offmoe.storage.store import ExpertStore
from offmoe.trace.trace import read_trace
from tests import tiny
from tests.doubles import count_verdicts
from tests.late_device import extension
from tests.late_device.extension import LateCapturer, LateGraph, LateKind
from tests.late_device.kernels import LOOKS, LateRoutedLayer

pytestmark = pytest.mark.skipif(not device_kernels.available(), reason="no Triton")

NEW = 12
STEPS = NEW - 1
"""Steps of one token of a generation: the first token comes from the prompt. One step captures nothing yet."""
GREEDY: dict[str, Any] = {
    **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False},
    **{"cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True},
}
LAYERS = 3
PROMPTS = (tiny.prompt(1, 12), tiny.prompt(1, 5, seed=3))
CAPTURED = {"mixtral": 3, "qwen3_moe": 3, "deepseek_v3": 3, "gpt_oss": 1}
"""Layers of each family that run as graphs. Two of gpt_oss's have a sliding window."""
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    saved: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in saved:
            sizes: dict[str, Any] = {"intermediate_size": 32} if family == "gpt_oss" else {}
            saved[family] = tiny.save(tiny.build(family, **sizes), tmp_path_factory.mktemp(family) / "model")
        return saved[family]

    return folder


@pytest.fixture
def load(folders: Callable[[str], Path], alone: LateKind) -> Load:
    def loaded(family: str = "mixtral", **options: Any) -> tiny.Model:
        chosen = {"slots_per_layer": 5, "exactness": "numeric", "lag": 1, "host_memory": "64MiB"}
        return offmoe.from_pretrained(folders(family), device="late", **{**chosen, "cuda_graphs": "auto", **options})

    return loaded


@pytest.fixture
def text(load: Load) -> torch.Tensor:
    """What layers that run as they are make of the first prompt."""
    model = load(cuda_graphs=False)
    with model.offload:
        return tokens(model)


def generate(model: tiny.Model, prompt: torch.Tensor, **options: Any) -> Any:
    return model.generate(prompt.to("late"), **{**GREEDY, **options})


def tokens(model: tiny.Model, **options: Any) -> torch.Tensor:
    found: torch.Tensor = generate(model, PROMPTS[0], **options).sequences.cpu()
    return found


@pytest.mark.parametrize("family", CAPTURED)
@pytest.mark.parametrize("ram", ["all", "some"])
def test_the_same_bits_and_an_exact_replay(load: Load, tmp_path: Path, family: str, ram: str) -> None:
    """Misses are gathered from RAM by the graph, or the stream waits in it until the host has read them."""
    given: list[Any] = []
    for graphs in (False, "auto"):
        places: dict[str, Any] = {"host_slots": 3} if ram == "some" else {}
        model = load(family, cuda_graphs=graphs, trace=tmp_path / f"{graphs}.npz", **places)
        with model.offload as offload:
            answers = [generate(model, prompt) for prompt in PROMPTS]
            logits = [step.cpu() for answer in answers for step in answer.logits]
            given.append(([answer.sequences.cpu() for answer in answers], logits, offload.stats()))
            captured = offload.captured
    (texts, logits, stats), (captured_texts, captured_logits, captured_stats) = given
    assert all(map(torch.equal, texts, captured_texts))
    assert all(map(torch.equal, logits, captured_logits))
    assert captured.replays == len(PROMPTS) * (STEPS - 1) * CAPTURED[family]
    assert stats.misses > 10
    assert (stats.misses, stats.hits) == (captured_stats.misses, captured_stats.hits)
    recorded = read_trace(tmp_path / "auto.npz")
    assert recorded.options is not None
    assert replay(recorded, recorded.options).stats == captured_stats


def wrong_rows(layer: Any, result: torch.Tensor) -> None:
    result.add_(1e-5)


def wrong_keys(layer: Any, result: torch.Tensor) -> None:
    layer.keys.mul_(1.01)


def wrong_length(layer: Any, result: torch.Tensor) -> None:
    layer.cumulative_length.add_(1)


@pytest.mark.parametrize("wrong", [wrong_rows, wrong_keys, wrong_length])
@pytest.mark.parametrize("graph", [0, 2])
def test_a_graph_that_differs_is_found_out(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: Any, graph: int
) -> None:
    """The step gives the layer's own rows, and its keys and values stay."""
    capture, made = LateCapturer.capture, [0]
    plain = load(cuda_graphs=False)
    with plain.offload:
        want = one_by_one(plain)
    model = load()
    cache = StaticCache(config=model.config, max_cache_len=32)

    def differs(capturer: LateCapturer, work: Callable[[], Any]) -> Any:
        made[0] += 1
        is_this = made[0] == graph + 1

        def and_more() -> Any:
            result = work()
            if is_this:
                wrong(cache.layers[graph], result)
            return result

        return capture(capturer, and_more)

    monkeypatch.setattr(LateCapturer, "capture", differs)
    with model.offload as offload:
        got = one_by_one(model, cache)
        assert offload.captured.replays == graph + 1
    off = "cuda_graphs: turned off, layers run as they are: a graph differs from its layer"
    assert caplog.text.count("cuda_graphs: ") == 1
    assert off in caplog.text
    assert all(map(torch.equal, got, want))


def one_by_one(model: Any, cache: StaticCache | None = None) -> list[torch.Tensor]:
    """The logits of a prompt, and of eight tokens behind it."""
    cache = StaticCache(config=model.config, max_cache_len=32) if cache is None else cache
    ids, logits = tiny.prompt(1, 20, seed=11), []
    with torch.no_grad():
        for start, end in ((0, 12), *((i, i + 1) for i in range(12, 20))):
            logits.append(model(ids[:, start:end].to("late"), past_key_values=cache).logits[:, -1].cpu())
    return logits


def test_a_layer_that_waits_for_the_host_cannot_be_captured(
    load: Load, text: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = load()
    block = model.model.layers[1].mlp
    forward = block.forward

    def waits(hidden_states: torch.Tensor) -> Any:
        assert float(hidden_states.sum()) < 1e9
        return forward(hidden_states)

    object.__setattr__(block, "forward", waits)
    with model.offload as offload:
        assert torch.equal(tokens(model), text)
        assert torch.equal(tokens(model), text)
        assert offload.captured.replays == 1, "the first layer's first check"
    assert caplog.text.count("a layer cannot be captured (late: a wait of the host cannot be captured") == 1


def test_an_expert_that_cannot_be_read_in_a_graph_is_an_error(
    load: Load, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read, take, seen = load(host_memory=0), ExpertStore.read_part, DeviceDecode._take, [0]

    def fails(store: ExpertStore, *given: Any) -> None:
        if seen[0] > 5 * LAYERS:
            raise CheckpointError("the disk is gone")
        read(store, *given)

    def taken(decode: DeviceDecode, entry: Entry) -> None:
        seen[0] += 1
        take(decode, entry)

    with model.offload as offload:
        with monkeypatch.context() as patched:
            patched.setattr(ExpertStore, "read_part", fails)
            patched.setattr(DeviceDecode, "_take", taken)
            with pytest.raises(CheckpointError, match=r"expert \d of MoE layer \d: the disk is gone"):
                tokens(model)
        before = offload.captured.replays
        assert before > 0
        assert torch.equal(tokens(model), text)
        assert offload.captured.replays - before == (STEPS - 1) * LAYERS


def test_a_host_that_does_not_answer_is_an_error(
    load: Load, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, answer, slow = load(host_memory=0), DeviceDecode._answer, [True]

    def sleeps(decode: DeviceDecode, *given: Any) -> None:
        replayed = model.offload.captured.replays
        if slow and replayed > CHECKS * LAYERS:
            monkeypatch.setattr("tests.late_device.kernels.LOOKS", 50)
            while not decode._aborted[0]:
                time.sleep(0.001)
        answer(decode, *given)

    with model.offload:
        monkeypatch.setattr(DeviceDecode, "_answer", sleeps)
        with pytest.raises(OffmoeError, match="waited too long for the host"):
            tokens(model)
        slow.clear()
        monkeypatch.setattr("tests.late_device.kernels.LOOKS", LOOKS)
        assert torch.equal(tokens(model), text)


@pytest.mark.parametrize("launch", [0, 4, 20])
def test_ctrl_c_in_a_graph(load: Load, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch, launch: int) -> None:
    model, launches, replays = load(host_slots=4), [0], LateGraph.replay

    def interrupted(graph: LateGraph) -> None:
        launches[0] += 1
        if launches[0] == launch + 1:
            raise KeyboardInterrupt
        replays(graph)

    monkeypatch.setattr(LateGraph, "replay", interrupted)
    with model.offload:
        with pytest.raises(KeyboardInterrupt):
            tokens(model)
        assert torch.equal(tokens(model), text)


def test_ctrl_c_while_a_layer_is_captured(load: Load, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, gather = load(), [0], LateRoutedLayer.gather

    def interrupted(layer: LateRoutedLayer) -> None:
        made[0] += 1
        if made[0] == LAYERS + 3:  # the first step launches one per layer, then each layer is captured and compared
            raise KeyboardInterrupt
        gather(layer)

    monkeypatch.setattr(LateRoutedLayer, "gather", interrupted)
    with model.offload as offload:
        with pytest.raises(KeyboardInterrupt):
            tokens(model)
        assert offload.captured.replays == 1
        assert torch.equal(tokens(model), text)
        assert offload.captured.replays == 1 + (STEPS - 1) * LAYERS


def test_a_context_longer_than_the_cache_is_an_error(load: Load) -> None:
    model = load()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with model.offload as offload, torch.no_grad():
        model(tiny.prompt(1, 10).to("late"), past_key_values=cache)
        token = torch.tensor([[5]]).to("late")
        for _ in range(6):
            model(token, past_key_values=cache)
        assert offload.captured.replays == 5 * LAYERS
        with pytest.raises(CapacityError, match="17 tokens of context do not fit the StaticCache, which was made for"):
            model(token, past_key_values=cache)


def test_what_passes_by_the_graphs(load: Load, text: torch.Tensor) -> None:
    """Other caches, gradients, hooks in a layer, outputs of every layer: layers run as they are."""
    model = load()
    cache, token = StaticCache(config=model.config, max_cache_len=32), torch.tensor([[5]])
    with model.offload as offload:
        assert torch.equal(tokens(model, cache_implementation=None), text), "a DynamicCache"
        for ids in (PROMPTS[0], token, token, token):
            model(ids.to("late"), past_key_values=cache)  # gradients are enabled
        assert offload.captured.replays == 0
        hidden: list[torch.Tensor] = []
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *given: hidden.append(given[2]))
        assert torch.equal(tokens(model), text)
        assert len(hidden) == NEW
        assert offload.captured.replays == (STEPS - 1) * (LAYERS - 1)
        hook.remove()
        before = offload.captured.replays
        found = generate(model, PROMPTS[0], output_hidden_states=True)
        assert torch.equal(found.sequences.cpu(), text)
        assert offload.captured.replays == before
    plain = load(cuda_graphs=False)
    with plain.offload:
        wanted = generate(plain, PROMPTS[0], output_hidden_states=True)
    for step, want in zip(found.hidden_states, wanted.hidden_states, strict=True):
        # which experts a prompt finds in slots changes its last bits
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(step, want, strict=True))


def test_outputs_of_a_hooked_layer_are_its_own(load: Load, text: torch.Tensor) -> None:
    """What a hook keeps from a step is not overwritten by the next one."""
    kept: list[list[torch.Tensor]] = []
    for graphs in (False, "auto"):
        model, outputs = load(cuda_graphs=graphs), list[torch.Tensor]()
        model.model.layers[0].register_forward_hook(lambda *given, to=outputs: to.append(given[2]))
        with model.offload as offload:
            assert torch.equal(tokens(model), text)
            kept.append([output.cpu() for output in outputs])
            assert offload.captured is None or offload.captured.replays == (STEPS - 1) * LAYERS
    assert all(map(torch.equal, *kept))


def test_weights_that_moved_are_seen(load: Load) -> None:
    """A cache that is used again finds the graphs of a model whose weights are other ones now."""
    logits = []
    for graphs in (False, "auto"):
        model = load(cuda_graphs=graphs)
        cache = StaticCache(config=model.config, max_cache_len=32)
        with model.offload as offload:
            logits += one_by_one(model, cache)
            cache.reset()
            logits += one_by_one(model, cache)
            before = 0 if offload.captured is None else offload.captured.replays
            norm = model.model.layers[1].input_layernorm
            norm.weight = torch.nn.Parameter(2 * norm.weight, requires_grad=False)
            cache.reset()
            logits += one_by_one(model, cache)
            if graphs:
                assert before == (7 + 8) * LAYERS, "the graphs of the first text serve the second"
                assert offload.captured.replays == before + 7 * LAYERS
    half = len(logits) // 2
    assert all(map(torch.equal, logits[:half], logits[half:]))


def test_inference_mode_has_graphs_of_its_own(load: Load, text: torch.Tensor) -> None:
    model = load()
    with model.offload as offload:
        for _ in range(2):
            with torch.inference_mode():
                assert torch.equal(tokens(model), text)
            assert torch.equal(tokens(model), text)
        assert offload.captured.replays == 4 * (STEPS - 1) * LAYERS


def test_slots_that_moved_are_captured_again(load: Load, text: torch.Tensor) -> None:
    model = load()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with model.offload as offload:
        first = one_by_one(model, cache)
        before = offload.captured.replays
        offload.resize(slots_per_layer=4)
        cache.reset()
        second = one_by_one(model, cache)
        assert offload.captured.replays == before + 8 * LAYERS
        assert all((a - b).norm() <= 1e-5 * a.norm() for a, b in zip(first, second, strict=True))


def test_a_step_of_hits_waits_for_one_number(load: Load) -> None:
    """The length of the cache, which the check of memory asks for once per step. No copy, no table."""
    model = load(slots_per_layer=8)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with model.offload as offload, torch.no_grad():
        for seed in range(3):
            model(tiny.prompt(1, 60, seed=seed).to("late"))
        model(tiny.prompt(1, 8).to("late"), past_key_values=cache)
        steps = [torch.tensor([[5 + i]]).to("late") for i in range(10)]
        for token in steps[:4]:
            model(token, past_key_values=cache)
        torch.accelerator.synchronize()
        stats, before = offload.stats(), extension.counts()
        for token in steps[4:]:
            model(token, past_key_values=cache)
        counts = extension.since(before)
        assert (offload.stats() - stats).misses == 0
        assert offload.captured.replays == 9 * LAYERS
    assert (counts.scalars, counts.host_waits, counts.async_copies) == (6, 6, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exactness": "bitwise"}, "steps of one token wait for the host"),
        ({"slots_per_layer": 3}, "steps of one token wait for the host"),
    ],
)
def test_where_nothing_is_captured(
    load: Load, caplog: pytest.LogCaptureFixture, options: dict[str, Any], reason: str
) -> None:
    model = load(**options)
    with model.offload as offload:
        assert f"cuda_graphs='auto': no layer is captured, since {reason}" in caplog.text
        assert offload.captured is None


def test_a_device_without_graphs(load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(LateKind, "capturer")
    with load().offload as offload:
        assert offload.captured is None
    assert "cuda_graphs='auto': no layer is captured, since the device captures nothing" in caplog.text


def test_verdicts_of_repeated_accesses(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check runs a layer twice; the planner, the statistics and a recording see it once."""
    seen = count_verdicts(monkeypatch)
    model = load()
    with model.offload as offload:
        tokens(model)
        assert seen.total() == (STEPS + CHECKS) * LAYERS
        assert sum(map(sum, offload.expert_map()[0])) == (12 + STEPS) * LAYERS * 2

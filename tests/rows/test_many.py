"""Many prompts in step give what each prompt gives by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offmoe
from offmoe.errors import CapacityError, ConfigError, OffmoeError
from offmoe.rows.row import RowRequest
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from tests import tiny

LENGTHS = (5, 17, 1, 9, 30)
LIMITS = (9, 4, 12, 6, 3)
OUTPUTS = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "eos_token_id": None}
SLIDING: dict[str, Any] = {"sliding_window": 6}


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention, windows shorter than the prompts, compressed keys."""
    more = SLIDING if request.param == "gpt_oss" else {}
    return tiny.save(tiny.build(request.param, **more), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("mixtral"))
    model: Any = offmoe.from_pretrained(path, device="cpu", slots_per_layer=4, max_context=256)
    with model.offload:
        yield model


def prompts() -> list[list[int]]:
    return [tiny.prompt(1, length, seed=length)[0].tolist() for length in LENGTHS]


def alone(model: Any, index: int, **options: Any) -> Any:
    ids = torch.tensor([prompts()[index]])
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def test_rows_equal_each_prompt_alone_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    model: Any = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefetch=1, trace=path)
    with model.offload:
        many = model.offload.generate_many(prompts(), max_new_tokens=LIMITS, batch_size=3, **OUTPUTS)
        model.offload.trace.close()
        stats = model.offload.stats()
        model.offload._executor.end_trace()
        for index, (limit, found) in enumerate(zip(LIMITS, many, strict=True)):
            expected = alone(model, index, max_new_tokens=limit, **OUTPUTS)
            assert torch.equal(found.sequences, expected.sequences)
            assert all(map(torch.equal, found.logits, expected.logits))
            assert len(found.logits) == limit
    trace = read_trace(path)
    assert trace.options is not None
    assert replay(trace, trace.options).stats == stats
    assert trace.token is not None
    tokens = {n: trace.token[trace.request == n].tolist() for n in range(len(LENGTHS))}
    longest_first = sorted(range(len(LENGTHS)), key=lambda i: -LENGTHS[i])
    fed = [many[i].sequences[0, :-1].tolist() for i in longest_first]  # the last token is not fed back
    assert list(tokens.values()) == fed


def test_rows_of_one_pass_differ_by_roundings_only(folder: Path) -> None:
    model: Any = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, exactness="numeric")
    with model.offload:
        many = model.offload.generate_many(prompts(), max_new_tokens=LIMITS, batch_size=3, **OUTPUTS)
        for index, (limit, found) in enumerate(zip(LIMITS, many, strict=True)):
            expected = alone(model, index, max_new_tokens=limit, **OUTPUTS)
            assert torch.equal(found.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-4)


def test_rows_share_reads(model: Any) -> None:
    """Equal prompts demand the experts of one."""
    offload, ids = model.offload, prompts()[1]
    offload.reset_stats()
    offload.generate_many([ids], max_new_tokens=4, eos_token_id=None)
    one = offload.stats().demands
    offload.reset_stats()
    offload.generate_many([ids] * 5, max_new_tokens=4, eos_token_id=None)
    assert offload.stats().demands == one


def test_every_row_samples_from_its_own_seed(model: Any) -> None:
    options = {"do_sample": True, "temperature": 2.0, "eos_token_id": None, "max_new_tokens": 8}
    many = model.offload.generate_many(prompts(), seed=5, **options)
    for index, found in enumerate(many):
        torch.manual_seed(5 + index)
        assert torch.equal(found, alone(model, index, **options))


def test_beams_and_end_tokens_are_those_of_generate(model: Any) -> None:
    ends = [token for token in range(3, tiny.VOCABULARY) if token % 4 == 0]
    for options in ({"num_beams": 2}, {"eos_token_id": ends}):
        many = model.offload.generate_many(prompts(), max_new_tokens=8, do_sample=False, batch_size=4, **options)
        for index, found in enumerate(many[:3]):
            assert torch.equal(found, alone(model, index, max_new_tokens=8, do_sample=False, **options))


def test_what_cannot_be_continued_is_refused_before_anything_runs(model: Any) -> None:
    offload = model.offload
    offload.reset_stats()
    with pytest.raises(CapacityError, match="prompt 1 needs 301 tokens of context"):
        offload.generate_many([[5], [5] * 300], max_new_tokens=2)
    with pytest.raises(ConfigError, match="prompt 0 has no tokens"):
        offload.generate_many([[]], max_new_tokens=2)
    with pytest.raises(ConfigError, match="has to be token ids"):
        offload.generate_many(["text"], max_new_tokens=2)
    with pytest.raises(ConfigError, match="batch_size=0"):
        offload.generate_many([[5]], max_new_tokens=2, batch_size=0)
    with pytest.raises(ConfigError, match="1 numbers for 2 prompts"):
        offload.generate_many([[5], [6]], max_new_tokens=[2])
    with pytest.raises(ConfigError, match="streamer"):
        offload.generate_many([[5]], max_new_tokens=2, streamer=object())
    assert offload.stats().demands == 0
    assert offload.generate_many([], max_new_tokens=2) == []


def test_the_model_serves_nobody_else_meanwhile_and_everybody_afterwards(model: Any) -> None:
    def use(_: int) -> None:
        model(torch.tensor([[5]]))

    with pytest.raises(OffmoeError, match="several prompts"):
        model.offload.generate_many(prompts(), max_new_tokens=3, on_done=use)
    assert model(torch.tensor([[5]])).logits.shape == (1, 1, tiny.VOCABULARY)
    assert torch.is_grad_enabled()


def test_an_error_of_one_row_is_its_own(model: Any) -> None:
    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such token")

    requests = [RowRequest(ids, 4, {"eos_token_id": None}) for ids in prompts()]
    requests[1] = RowRequest(prompts()[1], 4, {"logits_processor": [fail]})
    with closing(model.offload.session(requests).run()) as ended:
        rows = {row.index: row.strand for row in ended}
    assert isinstance(rows[1].error, ValueError)
    assert [rows[i].error for i in (0, 2, 3, 4)] == [None] * 4
    assert torch.equal(rows[0].result, alone(model, 0, max_new_tokens=4, eos_token_id=None))


def test_a_session_that_is_given_up_leaves_the_model_as_it_was(model: Any) -> None:
    requests = [RowRequest(ids, 4 + i, {"eos_token_id": None}) for i, ids in enumerate(prompts())]
    with closing(model.offload.session(requests).run()) as ended:
        next(ended)
    again = model.offload.generate_many(prompts(), max_new_tokens=4, eos_token_id=None)
    assert torch.equal(again[0], alone(model, 0, max_new_tokens=4, eos_token_id=None))


@pytest.mark.parametrize(("chunk", "together"), [(64, 2), (40, 1)])
def test_rows_under_way_have_room_in_the_kv_cache_and_in_a_step(tmp_path: Path, chunk: int, together: int) -> None:
    """Without a number of rows: contexts of 33 tokens leave room for 3 in 100, and a step for `together` prompts."""
    folder, path = tiny.save(tiny.build("mixtral"), tmp_path / "model"), tmp_path / "run.npz"
    model: Any = offmoe.from_pretrained(
        folder, device="cpu", slots_per_layer=3, max_context=100, prefill_chunk=chunk, trace=path
    )
    with model.offload:
        ids = [tiny.prompt(1, 30, seed=i)[0].tolist() for i in range(8)]
        many = model.offload.generate_many(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [output.shape[1] for output in many] == [34] * 8
    trace = read_trace(path)
    of_prompts = trace.prefill
    assert max(len(np.unique(trace.request[rows])) for rows in trace.steps()) == 3
    assert max(int(of_prompts[rows].sum()) for rows in trace.steps()) == 30 * together

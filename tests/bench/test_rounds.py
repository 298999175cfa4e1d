"""Paired rounds between processes: figures per round, errors as what they are, and an end for every process."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest

from offmoe.bench import rounds
from offmoe.bench.memory_cap import MemoryCap
from offmoe.bench.messages import Costs, Outcome, Pass, Task, send
from offmoe.errors import CapacityError, ConfigError, OffmoeError


def test_messages_survive_the_way() -> None:
    pipe, work = io.BytesIO(), Pass((1, 2), 3, forced=(4,), row=5)
    send(pipe, ("run", work))
    send(pipe, ConfigError("no"))
    pipe.seek(0)
    assert pickle.load(pipe) == ("run", work)
    error = pickle.load(pipe)
    assert (type(error), str(error)) == (ConfigError, "no")


def test_a_process_works_fails_and_ends(task: Task) -> None:
    with rounds.ContenderProcess("ours", task) as contender:
        between: list[int] = []
        (record,) = rounds.paired([contender], [Pass((5, 6), 3), Pass((7, 8), 3)], lambda: between.append(1))
        assert (len(between), len(record.outcomes)) == (1, 1)
        values = record.to_dict()
        assert values["tokens_per_s"] == pytest.approx(1e3 / values["ms_per_token"])
        assert values["peak"]["rss"] > 50 << 20
        assert values["peak"]["cgroup"] is None
        with pytest.raises(OffmoeError, match=r"ours: .*65 tokens of context"):
            contender.run(Pass((5,) * 65, 2))
        with pytest.raises(OffmoeError, match="ours ended with status 0"):
            contender.run(Pass((5,), 2))
    contender.close()


def test_what_goes_past_its_cap_is_ended(task: Task) -> None:
    try:
        MemoryCap.create(1 << 30, "probe").close()
    except CapacityError as error:
        pytest.skip(str(error))
    with pytest.raises(CapacityError, match=r"small was ended by the kernel.*memory cap of 48.0 MiB"):
        rounds.ContenderProcess("small", task, cap=48 << 20)


@pytest.mark.slow
def test_the_peak_under_a_cap_is_known(task: Task) -> None:
    try:
        contender = rounds.ContenderProcess("roomy", task, cap=2 << 30)
    except CapacityError as error:
        pytest.skip(str(error))
    with contender:
        contender.run(Pass((5,), 2))
        peak = contender.peak()["cgroup"]
    assert peak is not None
    assert 50 << 20 < peak < 2 << 30


def outcome(ttft_s: float, token_s: float, missed: int = 0, digest: str = "x") -> Outcome:
    stats = {"hit_rate": 0.5, "disk_bytes": missed, "h2d_bytes": missed, "prefetched": 0, "stall_s": 0.0}
    stats |= {"hits": 5, "pending": 0, "misses": 5}
    return Outcome((1, 2, 3), digest, ttft_s, (token_s, token_s), stats, None)


class Scripted:
    """An contender that only remembers when it was asked."""

    def __init__(self, name: str, log: list[str]):
        self._name, self._log = name, log

    def run(self, work: Pass) -> Outcome:
        self._log.append(f"{self._name}{work.row}")
        return outcome(1, 0.1)

    def peak(self) -> dict[str, int]:
        return {}


def test_who_begins_changes_and_the_first_pass_warms_up() -> None:
    log: list[str] = []
    contenders: list[Any] = [Scripted("a", log), Scripted("b", log)]
    a, b = rounds.paired(contenders, [Pass((1,), 2, row=i) for i in range(3)])
    assert log == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert (len(a.outcomes), len(b.outcomes)) == (2, 2)


def test_ratios_are_of_a_round_and_medians_over_rounds() -> None:
    fast = rounds.Record([outcome(1, 0.1), outcome(1, 0.2), outcome(1, 0.4)])
    slow = rounds.Record([outcome(2, 0.3), outcome(3, 0.4), outcome(4, 4.0, digest="y")])
    assert rounds.ratio(slow, fast) == pytest.approx({"median": 3.0, "least": 2.0, "most": 10.0})
    assert rounds.ratio(slow, fast, lambda o: o.ttft_s)["median"] == 3
    assert rounds.same(slow, fast) == {"tokens": True, "logits": False}


def test_the_bound_is_the_slowest_of_three() -> None:
    record = rounds.Record([outcome(1, 0.5, missed=2 * 10**8)])  # 100 MB a token
    found = rounds.roofline(record, Costs(compute_s=0.02, link_gb_s=10.0), disk_gb_s=1.0)
    assert (found["disk_ms"], found["link_ms"], found["compute_ms"]) == pytest.approx((100, 10, 20))
    assert (found["bound_ms"], found["share"]) == pytest.approx((100, 0.2))
    assert rounds.roofline(record, Costs(0.25, None), 1.0)["share"] == pytest.approx(0.5)

"""The example of an eviction policy runs, prints two hit rates, and its policy keeps the contract."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from tests.policy.eviction.contract import ScoreContract

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_policy.py"


class TestRecentAndFrequent(ScoreContract):
    def policy(self, num_keys):
        return runpy.run_path(str(EXAMPLE))["RecentAndFrequent"]()


def test_it_prints_hit_rates(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    rates = re.findall(r"([\w-]+): ([\d.]+)% of demands hit", capsys.readouterr().out)
    assert [name for name, _ in rates] == ["aged-lfu", "recent-and-frequent"]
    assert all(30 < float(rate) < 90 for _, rate in rates)

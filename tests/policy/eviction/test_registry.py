"""Policies from outside: registered by name, imported by MODULE:CLASS, refused with a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import offmoe
from offmoe.config import CacheOptions, OffloadConfig
from offmoe.errors import ConfigError
from offmoe.policy.eviction import Pool, ScoredPolicy
from offmoe.policy.eviction.lru import LRU
from offmoe.policy.eviction.registry import build_eviction, import_eviction
from offmoe.simulate.replay import replay
from offmoe.simulate.sweep import sweep
from offmoe.trace.trace import Trace
from offmoe.types import CacheShape

SHAPE = CacheShape((8, 8), (2, 2), (10, 10))

MODULE = """
from offmoe.policy.eviction.lru import LRU
class Mine(LRU): pass
class Other: pass
"""


class HighestFirst(ScoredPolicy):
    """Evicts the highest key; needs the keys of its pool."""

    @classmethod
    def for_pool(cls, pool: Pool) -> HighestFirst:
        return cls({key: -float(key) for key in pool.keys})

    def on_access(self, keys, demands, tail):
        pass


def trace(**changes) -> Trace:
    chance = np.random.default_rng(0)
    experts = np.stack([[chance.permutation(8)[:2] for _ in range(2)] for _ in range(40)]).astype(np.int16)
    return Trace("m", SHAPE, experts, np.zeros(40, np.int32), np.arange(40, dtype=np.int32), **changes)


def test_a_registered_policy_decides():
    offmoe.register_eviction("test-lru", LRU)
    offmoe.register_eviction("test-lru", LRU)  # the same again is nothing new
    OffloadConfig(eviction="test-lru")
    counts = {name: replay(trace(), CacheOptions(name, slots_per_layer=4)).stats for name in ("lru", "test-lru")}
    assert counts["lru"] == counts["test-lru"]


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_class_may_depend_on_its_pool(scope):
    offmoe.register_eviction("test-highest", HighestFirst)
    stats = replay(trace(), CacheOptions("test-highest", scope, slots_per_layer=4)).stats
    assert stats != replay(trace(), CacheOptions("lru", scope, slots_per_layer=4)).stats


def test_the_processes_of_a_sweep_know_registered_policies():
    offmoe.register_eviction("test-lru", LRU)
    options = [CacheOptions(name, slots_per_layer=4) for name in ("lru", "test-lru")]
    first, second = sweep(trace(), options, jobs=2)[0]
    assert first.whole.stats == second.whole.stats


@pytest.mark.parametrize(
    ("name", "factory", "message"),
    [
        ("", LRU, "must be a string"),
        ("lru", LRU, "'lru', .* is taken"),
        ("test-taken", ScoredPolicy, "is taken"),
        ("test-none", None, "class or a function"),
    ],
)
def test_what_cannot_be_registered(name, factory, message):
    offmoe.register_eviction("test-taken", LRU)
    with pytest.raises(ConfigError, match=message):
        offmoe.register_eviction(name, factory)


def test_a_factory_must_give_a_policy():
    offmoe.register_eviction("test-dict", dict)
    with pytest.raises(ConfigError, match="gives a dict"):
        build_eviction(Pool(range(8), 1, CacheOptions("test-dict"), SHAPE))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Policy", "cannot be imported: ModuleNotFoundError"),
        ("test_policy_module:Missing", "cannot be imported: AttributeError"),
        ("test_policy_module:Other", "derive the class"),
        ("broken_policy_module:Policy", "cannot be imported: ZeroDivisionError"),
        (":", "cannot be imported: ValueError"),
    ],
)
def test_what_cannot_be_imported(tmp_path, monkeypatch, name, message):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "test_policy_module.py").write_text(MODULE)
    (tmp_path / "broken_policy_module.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=message):
        import_eviction(name)


def test_a_policy_is_imported_by_module_and_class(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "test_other_module.py").write_text(MODULE)
    with pytest.raises(ConfigError, match="--eviction test_other_module:Mine on the command line"):
        OffloadConfig(eviction="test_other_module:Mine")
    assert import_eviction("test_other_module:Mine") == "test_other_module:Mine"
    assert OffloadConfig(eviction="test_other_module:Mine").eviction == "test_other_module:Mine"
    assert import_eviction("lru") == "lru"


def test_registering_imports_neither_torch_nor_a_policy():
    code = (
        "import sys, offmoe; offmoe.register_eviction('x', object);"
        "assert not {'torch', 'offmoe.policy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])

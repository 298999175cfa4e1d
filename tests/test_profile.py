"""Profiles: written whole, read with a reason for every refusal, and between what was asked and the defaults."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from offmoe.config import CacheOptions, OffloadConfig
from offmoe.errors import ConfigError, OffmoeError
from offmoe.profile import CostModel, Profile, read_profile

CACHE = {"eviction": "lru", "scope": "model", "slots_per_layer": [3, 4], "prefetch": 0, "half_life": 8.0}
COSTS = {"disk_gb_s": 2.0, "expert_us_device": 10, "dense_us_per_token": 100}


def test_round_trip(tmp_path):
    path = tmp_path / "p.json"
    profile = Profile(CACHE, CostModel.from_dict(COSTS), {"hit_rate": 0.5})
    profile.write(path)
    assert read_profile(path) == profile
    assert [f.name for f in tmp_path.iterdir()] == ["p.json"]
    Profile(CACHE).write(path)
    assert json.loads(path.read_text()) == {"cache": CACHE}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "no profile"),
        ("{}", "no profile"),
        ('{"cache": 3}', "must be an object"),
        ('{"cache": {}, "cost": {}}', "'cost' is unknown"),
        ('{"cache": {"slots": 3}}', "cache option 'slots' is unknown"),
        ('{"costs": {"disk_gb_s": 1}}', "'expert_us_device' is missing"),
        (json.dumps({"costs": {**COSTS, "disk_gb_s": 0}}), "disk_gb_s=0 must be a positive number"),
        (json.dumps({"costs": {**COSTS, "disk_gb_s": "fast"}}), "disk_gb_s='fast'"),
        (json.dumps({"costs": {**COSTS, "expert_us_device": -1}}), "expert_us_device=-1"),
        (json.dumps({"costs": {**COSTS, "dense_us_per_token": True}}), "dense_us_per_token=True"),
        (json.dumps({"costs": {**COSTS, "h2d_gb_s": float("inf")}}), "h2d_gb_s=inf"),
        (json.dumps({"costs": {**COSTS, "tapes": 1}}), "'tapes' is unknown"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, text, says):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        OffloadConfig(profile=path)


def test_costs_that_nothing_is_priced_with_are_ignored(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"costs": {**COSTS, "expert_us_device_4": 30.0, "disk_gb_s_overlapped": None}}))
    assert read_profile(path).costs == CostModel.from_dict(COSTS)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        Profile(CACHE).write(tmp_path / "no" / "p.json")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_full_disk_is_no_wrong_option(tmp_path, monkeypatch):
    @contextmanager
    def full(path):
        yield Path("/dev/full")

    monkeypatch.setattr("offmoe.profile.replacing", full)
    with pytest.raises(OffmoeError, match="free space") as raised:
        Profile(CACHE).write(tmp_path / "p.json")
    assert raised.value.exit_status == 1


def test_explicit_over_profile_over_default():
    profile = Profile(CACHE)
    config = OffloadConfig(profile=profile)
    assert config.cache() == CacheOptions("lru", "model", (3, 4), 0, 8.0, on_miss="auto")
    config = OffloadConfig(eviction="aged-lfu", scope="layer", slots_per_layer=5, prefetch="auto", profile=profile)
    assert config.cache() == CacheOptions("aged-lfu", "layer", 5, "auto", 8.0, on_miss="auto")
    assert OffloadConfig(slots_per_layer=5, profile=Profile({"prefetch": 2})).cache() == CacheOptions(
        "aged-lfu", "layer", 5, 2, on_miss="auto"
    )


def test_resolving_does_not_ask_the_profile_again():
    config = OffloadConfig(eviction="aged-lfu", profile=Profile(CACHE)).resolved(slots_per_layer=7)
    assert (config.eviction, config.slots_per_layer) == ("aged-lfu", 7)
    assert type(config.eviction) is str


def test_values_of_a_profile_are_checked_like_options():
    for name, value in (("eviction", 3), ("prefetch", "some"), ("slots_per_layer", "4"), ("half_life", "long")):
        with pytest.raises(ConfigError, match=name):
            OffloadConfig(profile=Profile({name: value}))
    with pytest.raises(ConfigError, match="popularity must be"):
        OffloadConfig(profile=Profile({"eviction": "static", "popularity": [["a"]]}))


def test_static_needs_its_popularity():
    with pytest.raises(ConfigError, match="belong together"):
        OffloadConfig(eviction="static")
    profile = Profile({"eviction": "static", "popularity": [[1, 2], [3, 4]]})
    assert OffloadConfig(slots_per_layer=2, profile=profile).cache().popularity == ((1.0, 2.0), (3.0, 4.0))
    assert OffloadConfig(slots_per_layer=2, eviction="lru", profile=profile).cache().popularity is None


def test_a_later_profile_decides_what_was_not_given():
    profile = Profile(CACHE)
    config = OffloadConfig(scope="layer", max_context=64).overridden(profile=profile, slots_per_layer=None)
    assert (config.eviction, config.scope, config.slots_per_layer, config.max_context) == ("lru", "layer", (3, 4), 64)
    assert config.overridden(eviction="sieve").eviction == "sieve"
    resolved = config.resolved(slots_per_layer=7).overridden(
        profile=Profile({"eviction": "lru-2", "slots_per_layer": 2})
    )
    assert (resolved.eviction, resolved.slots_per_layer) == ("lru", 7)

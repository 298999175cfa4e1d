"""Options: what is accepted, what is refused and with which words."""

from __future__ import annotations

import numpy as np
import pytest

from offmoe.config import CacheOptions, OffloadConfig
from offmoe.errors import ConfigError
from offmoe.text import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GiB", 10 << 30),
        ("10 GB", 10**10),
        ("512M", 512 * 10**6),
        ("1.5KiB", 1536),
        ("7", 7),
        (4096, 4096),
        ("2tib", 2 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, "device_memory") == size


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "10 XB", "0", 0, -5, "1e9", None, True])
def test_what_is_no_size_is_named(text):
    with pytest.raises(ConfigError, match="device_memory="):
        parse_size(text, "device_memory")


@pytest.mark.parametrize("size", [2**63, "9" * 400, "9" * 400 + "GiB", "9999999999TiB"])
def test_what_no_memory_has_is_no_size(size):
    with pytest.raises(ConfigError, match="device_memory"):
        OffloadConfig(device_memory=size)
    with pytest.raises(ConfigError, match="max_context"):
        OffloadConfig(max_context=2**63)


def test_sizes_are_readable():
    assert format_size(1536) == "1.5 KiB"
    assert format_size(5 << 40) == "5.0 TiB"
    assert format_size(12) == "12 B"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eviction": "random"}, "eviction='random' is unknown. Use one of: aged-lfu, lru"),
        ({"eviction": "static"}, "use a profile"),
        ({"profile": "/no/such/profile.json"}, "cannot be read"),
        ({"experts": "int3"}, "unknown. Use one of: native, int8, int4"),
        ({"on_miss": "swap"}, "on_miss='swap' is unknown. Use one of: fetch, cpu, auto"),
        ({"exactness": "fuzzy"}, "bitwise, numeric"),
        ({"experts": "int4", "exactness": "bitwise"}, "other weights than the checkpoint"),
        ({"activations": "int8", "exactness": "bitwise"}, "exactness='numeric'"),
        ({"activations": "int2"}, "float, int8"),
        ({"host_memory": "ten"}, "is not a size"),
        ({"scope": "galaxy"}, "scope"),
        ({"prefetch": -1}, "prefetch"),
        ({"prefetch": "some"}, "prefetch"),
        ({"prefetch": True}, "prefetch"),
        ({"slots_per_layer": 0}, "positive"),
        ({"slots_per_layer": "4"}, "slots_per_layer"),
        ({"max_context": 0}, "max_context"),
        ({"device_memory": "big"}, "device_memory"),
        ({"cuda_graphs": True, "lag": 1}, "cuda_graphs=True must be False or 'auto'"),
        ({"cuda_graphs": "auto"}, "cuda_graphs='auto' takes lag=1"),
    ],
)
def test_refusals_name_the_option(options, message):
    with pytest.raises(ConfigError, match=message):
        OffloadConfig(**options)


def test_graphs_are_an_option_of_the_run_and_not_of_its_decisions():
    config = OffloadConfig(lag=1, cuda_graphs="auto", slots_per_layer=4)
    assert config.cuda_graphs == "auto"
    assert "cuda_graphs" not in config.cache().to_dict()
    assert OffloadConfig(lag=1, slots_per_layer=4).cuda_graphs is False


def test_cache_options_survive_json():
    options = CacheOptions("lru", "model", (2, 3, 4), "auto", on_miss="cpu")
    assert CacheOptions.from_dict({**options.to_dict(), "slots_per_layer": [2, 3, 4]}) == options


def test_popularity_may_be_an_array() -> None:
    counts = np.array([[3.0, 1.0], [2.0, 2.0]])
    for eviction, popularity in (("static", ((3.0, 1.0), (2.0, 2.0))), ("lru", None)):
        config = OffloadConfig(eviction=eviction, popularity=counts, slots_per_layer=1)  # type: ignore[arg-type]
        assert "popularity" in config.explicit
        assert config.cache().popularity == popularity


def test_slots_in_an_array_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"slots_per_layer=array\(\[3, 4\]\) must be an int or one int per MoE layer"):
        OffloadConfig(slots_per_layer=np.array([3, 4]))  # type: ignore[arg-type]

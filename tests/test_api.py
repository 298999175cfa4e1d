"""`from_pretrained`: its signature, and options that are refused before anything is downloaded, quantized or loaded."""

from __future__ import annotations

import ast
import inspect
import socket
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

import offmoe
from offmoe import api
from offmoe.config import OffloadConfig
from offmoe.errors import ConfigError
from offmoe.hf.load.options import FORWARDED, OURS, UNUSABLE, WITHOUT_EFFECT
from offmoe.profile import Profile
from tests import tiny

PARAMETERS = inspect.signature(offmoe.from_pretrained).parameters
LOADING = {"model", "offload_config", "trace", "dtype", "hf_kwargs"}
INTERNAL = {"miss_costs", "warm_counts"}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


WRONG = [
    ({"eviction": "random"}, "eviction='random' is unknown"),
    ({"scope": "galaxy"}, "scope='galaxy' is unknown"),
    ({"on_miss": "swap"}, "on_miss='swap' is unknown"),
    ({"prefetch": -1}, "prefetch=-1"),
    ({"experts": "int3"}, "experts='int3' is unknown"),
    ({"exactness": "fuzzy"}, "exactness='fuzzy' is unknown"),
    ({"activations": "int8", "exactness": "bitwise"}, "exactness='numeric'"),
    ({"device": "tpu"}, "device='tpu'"),
    ({"device_memory": "big"}, "device_memory='big'"),
    ({"device": "cpu", "host_memory": "1GiB"}, "host_memory=.*this device's memory is the RAM"),
    ({"slots_per_layer": 0}, "slots_per_layer=0"),
    ({"max_context": 0}, "max_context=0"),
    ({"half_life": -1.0}, "half_life=-1.0"),
    ({"host_slots": "many"}, "host_slots='many'"),
    ({"eviction": "static"}, "belong together"),
    ({"profile": "/no/such/profile.json"}, "cannot be read"),
    ({"profile": Profile({"eviction": "rand"})}, "eviction='rand' is unknown"),
    ({"dtype": "float7"}, "dtype='float7' is unknown"),
    ({"dtype": "int8"}, "not one to compute in"),
    ({"torch_dtype": "float7"}, "dtype='float7' is unknown"),
    ({"trace": "/no/such/folder/t.npz"}, "does not exist; create it first"),
    ({"trace": "/"}, "is a folder; give the name of a file"),
    ({"trace": __file__}, "is no trace"),
    ({"slot_per_layer": 3}, r"'slot_per_layer' is no option .*\(did you mean 'slots_per_layer'\?\)"),
    ({"devise": "cpu"}, r"did you mean 'device'\?"),
    ({"offload_cfg": None}, r"did you mean 'offload_config'\?"),
    ({"local_file_only": True}, r"did you mean 'local_files_only'\?"),
    ({"atn_implementation": "eager"}, r"did you mean 'attn_implementation'\?"),
    ({"device_map": "auto"}, "'device_map' of transformers: offmoe sets it itself; give device="),
    ({"quantization_config": {"load_in_4bit": True}}, "offmoe cannot honor it; give experts='int4'"),
    ({"use_safetensors": False}, "never loads pickled weights"),
    ({"config": {"num_hidden_layers": 2}}, "config= must be a configuration .*, not dict. Give single values"),
    ({"generation_config": {"num_beams": 2}}, "must be a GenerationConfig of transformers, not dict"),
    ({"offload_config": "cpu"}, "must be an OffloadConfig"),
    ({"offload_config": OffloadConfig(), "exactness": "bitwise", "experts": "int4"}, "other weights"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
@pytest.mark.usefixtures("no_network")
def test_a_wrong_option_is_refused_without_network(options: dict[str, Any], message: str) -> None:
    """The model is on no disk: without the refusal, the Hub would be asked first."""
    with pytest.raises(ConfigError, match=message):
        offmoe.from_pretrained("nobody/no-such-model-in-any-cache", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_layer": (2, 0, 2), "scope": "layer"}, "slots_per_layer=0 for MoE layer 1"),
        ({"slots_per_layer": (3, 3)}, "2 values, but the model has 3 MoE layers"),
        ({"profile": Profile({"eviction": "static", "popularity": [[1.0, 2.0]]})}, "counted on another model"),
        ({"trace": "/no/such/folder/t.npz"}, "does not exist; create it first"),
        ({"nonsense": 1}, "'nonsense' is no option"),
    ],
)
def test_a_wrong_option_is_refused_before_experts_are_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("experts were quantized or downloaded")

    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    monkeypatch.setattr(api, "fetch", refuse)
    with pytest.raises(ConfigError, match=message):
        offmoe.from_pretrained(folder, device="cpu", experts="int8", **options)


def test_options_in_one_object_and_by_keyword(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    config = OffloadConfig(device="cpu", slots_per_layer=2, eviction="lru")
    with offmoe.from_pretrained(folder, config).offload as offload:
        assert (offload.config.slots_per_layer, offload.config.eviction) == (2, "lru")
    with offmoe.from_pretrained(folder, offload_config=config, slots_per_layer=3).offload as offload:
        assert (offload.config.slots_per_layer, offload.config.eviction) == (3, "lru")
    assert config.slots_per_layer == 2


def test_the_signature_names_every_option() -> None:
    options = {f.name for f in fields(OffloadConfig) if f.init} - INTERNAL
    assert PARAMETERS.keys() - LOADING == options
    assert all(PARAMETERS[name].default is None for name in options)


def test_the_options_of_transformers_are_all_known() -> None:
    """A new option of transformers' from_pretrained has to be passed on or refused knowingly."""
    function = transformers.PreTrainedModel.from_pretrained
    taken = set(inspect.signature(function).parameters) - {"pretrained_model_name_or_path", "model_args", "kwargs"}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "kwargs.pop"
            and isinstance(node.args[0], ast.Constant)
        ):
            taken.add(str(node.args[0].value))
    known = [set(OURS), set(UNUSABLE), set(FORWARDED), set(WITHOUT_EFFECT), {*api.HUB_OPTIONS}]
    assert taken - set().union(*known) - {"config", "dtype", "torch_dtype"} == set()
    assert sum(map(len, known)) == len(set().union(*known))  # no option is in two of them

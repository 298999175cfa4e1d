"""The options of transformers' `from_pretrained`: which ones act, how, and which ones are refused and why.

A keyword that is no option is a value of the model's configuration, as in transformers (overrides.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from offmoe.errors import ConfigError
from offmoe.hf.catalog.build import COMPUTABLE
from offmoe.hf.load.config_names import in_any_config
from offmoe.hf.load.overrides import ConfigChange
from offmoe.storage.checkpoint import Checkpoint

OURS = {
    "device_map": "give device= and device_memory= instead",
    "experts_implementation": "leave it out",
    "output_loading_info": "leave it out; a weight that is missing is an error",
}
"""Options that offmoe sets itself, and what to do instead."""
UNUSABLE = {
    "adapter_kwargs": "no adapter is loaded with the model; leave it out",
    "device_mesh": "the model runs on one device; leave it out",
    "disable_mmap": "it reads whole shards, experts included; leave it out",
    "distributed_config": "the model runs on one device; leave it out",
    "ignore_mismatched_sizes": "a weight of another size would become a random one; leave it out",
    "key_mapping": "names of tensors are those of the checkpoint; rename them there",
    "max_memory": "give device_memory= and host_memory= instead",
    "offload_buffers": "buffers stay on the device; leave it out",
    "offload_folder": "experts stay in their shards; leave it out",
    "proxies": "set the system's HTTPS_PROXY instead",
    "quantization_config": "give experts='int4' or 'int8', or a checkpoint that is quantized already",
    "state_dict": "experts are read from shards; save the weights as a checkpoint first",
    "tp_plan": "the model runs on one device; leave it out",
    "tp_size": "the model runs on one device; leave it out",
    "use_safetensors": "offmoe never loads pickled weights; leave it out",
    "variant": "give a folder whose weights are named model.safetensors, or a revision=",
}
"""Options that would change which weights are loaded, or where to, without the catalog's knowledge; what to do
instead."""
NOT_ASKED: dict[str, tuple[object, ...]] = {
    "adapter_kwargs": ({},),
    "disable_mmap": (False,),
    "ignore_mismatched_sizes": (False,),
    "offload_buffers": (False,),
    "output_loading_info": (False,),
    "proxies": ({},),
    "use_safetensors": (True,),
}
"""Values, besides None, under which an option of OURS or UNUSABLE asks for nothing that is not so anyway."""
FORWARDED = frozenset(
    {
        "allow_all_kernels",
        "attn_implementation",
        "fusion_config",
        "generation_config",
        "kernel_config",
        "tqdm_class",
        "use_kernels",
    }
)
"""Options that go to transformers as they are."""
WITHOUT_EFFECT = frozenset(
    {
        "adapter_name",  # no adapter is loaded
        "code_revision",  # a checkpoint's own code never runs
        "trust_remote_code",
        "weights_only",  # nothing is unpickled
        # transformers accepts these and ignores them, or sets them itself when it is called by one of its own classes
        "_commit_hash",
        "_fast_init",
        "_from_auto",
        "_from_pipeline",
        "from_flax",
        "from_tf",
        "low_cpu_mem_usage",
        "mirror",
        "name_or_path",
        "offload_state_dict",
    }
)
"""Options that change nothing about a model that offmoe loads."""
MISSPELT = 0.8
"""How much of two words is equal (difflib's ratio) if one is taken for a misspelling of the other."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What a caller of `from_pretrained` asks of transformers.

    Args:
        change: The configuration, if it is not the one of the checkpoint.
        dtype: Dtype to compute in, by transformers' old name `torch_dtype`; None if it was not used.
        forwarded: Options that go to transformers' from_pretrained as they are.
        trusted: Whether `trust_remote_code` was given.
        plain: Generate without the settings of generation_config.json, as `offmoe bench` does.
    """

    change: ConfigChange = field(default_factory=ConfigChange)
    dtype: str | torch.dtype | None = None
    forwarded: Mapping[str, object] = field(default_factory=dict)
    trusted: bool = False
    plain: bool = False

    @property
    def reads_generation_config(self) -> bool:
        """Whether transformers will read the settings of generation_config.json."""
        return not self.plain and self.forwarded.get("generation_config") is None


def sort_options(options: Mapping[str, Any], known: Iterable[str] = ()) -> ModelOptions:
    """Divide keywords of transformers' `from_pretrained` by what they act on.

    Args:
        options: The keywords and their values.
        known: Keywords of the caller itself, which a misspelt one may have meant.

    Raises:
        ConfigError: The first keyword that cannot be used. Whether a keyword is a value of the configuration is known
            only when that was read, except for one that is spelled like an option and is in no configuration at all.
    """
    forwarded: dict[str, object] = {}
    overrides: dict[str, object] = {}
    names = sorted({*known, *OURS, *UNUSABLE, *FORWARDED, *WITHOUT_EFFECT, "config", "torch_dtype"})
    for name, value in options.items():
        if name in OURS or name in UNUSABLE:
            _refuse(name, value)
        elif name == "attn_implementation":  # a value of the configuration, so that a wrong one is refused early
            overrides[name] = value
        elif name in FORWARDED:
            forwarded[name] = value
        elif name not in WITHOUT_EFFECT and name not in ("config", "torch_dtype"):
            meant = get_close_matches(name, names, n=1, cutoff=MISSPELT)
            if meant and not in_any_config(name):
                hint = f" (did you mean {meant[0]!r}?)"
                raise ConfigError(f"{name!r} is no option of offmoe, nor of transformers' from_pretrained{hint}.")
            overrides[name] = value
    _check_generation_config(forwarded)
    change = ConfigChange(_config(options.get("config")), overrides)
    return ModelOptions(
        change=change,
        dtype=options.get("torch_dtype"),
        forwarded=forwarded,
        trusted=bool(options.get("trust_remote_code")),
    )


def check_forwarded(options: Mapping[str, object]) -> None:
    """Refuse options that do not go to transformers as they are (ConfigError)."""
    for name, value in options.items():
        if name in OURS or name in UNUSABLE:
            _refuse(name, value)
        if name not in FORWARDED:
            raise ConfigError(f"{name!r} is no option that goes to transformers' from_pretrained; leave it out.")


def _refuse(name: str, value: object) -> None:
    if value is None or any(type(value) is type(idle) and value == idle for idle in NOT_ASKED.get(name, ())):
        return
    why = "offmoe sets it itself" if name in OURS else "offmoe cannot honor it"
    remedy = OURS.get(name) or UNUSABLE[name]
    raise ConfigError(f"option {name!r} of transformers: {why}; {remedy}.")


def _config(config: object) -> PreTrainedConfig | str | None:
    if config is None or isinstance(config, PreTrainedConfig):
        return config
    if isinstance(config, str | os.PathLike):
        return os.fspath(config)
    raise ConfigError(
        f"config= must be a configuration of transformers or the path of one, not {type(config).__name__}. Give "
        "single values by keyword: num_experts_per_tok=1."
    )


def _check_generation_config(forwarded: Mapping[str, object]) -> None:
    value = forwarded.get("generation_config")
    if not isinstance(value, GenerationConfig | None):
        raise ConfigError(
            f"generation_config= must be a GenerationConfig of transformers, not {type(value).__name__}; "
            "GenerationConfig.from_dict makes one of a dict."
        )


def compute_dtype(dtype: str | torch.dtype | None, hf_config: PreTrainedConfig, default: torch.dtype) -> torch.dtype:
    """The dtype to compute in.

    Args:
        dtype: the dtype that the user asked for; None or "auto" means the checkpoint's own.
        hf_config: the model's configuration.
        default: used if the configuration names no dtype.

    Raises:
        ConfigError: there is no such dtype, or models cannot compute in it.
    """
    if dtype is None or dtype == "auto":
        dtype = getattr(hf_config, "dtype", None) or getattr(hf_config.get_text_config(), "dtype", None) or default
    return parse_dtype(dtype)


def dtype_of_weights(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that transformers computes in if the configuration names none: that of the first weight at rest."""
    first = sorted(name for name, info in checkpoint.tensors.items() if info.shard == 0)
    dtypes = (checkpoint.tensors[name].dtype for name in first)
    return next((dtype for dtype in dtypes if dtype in COMPUTABLE), torch.float32)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name.

    Raises:
        ConfigError: there is no such dtype, or models cannot compute in it.
    """
    named = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is unknown. Use 'auto', 'bfloat16', 'float16' or 'float32'.")
    if named not in COMPUTABLE:
        raise ConfigError(f"dtype={dtype!r} is not one to compute in. Use 'bfloat16', 'float16' or 'float32'.")
    return named

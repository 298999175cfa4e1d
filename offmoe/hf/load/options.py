"""The options of transformers' `from_pretrained` that offmoe passes on, and those that it refuses and why."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from offmoe.errors import ConfigError
from offmoe.hf.catalog.build import COMPUTABLE
from offmoe.text import did_you_mean

OURS = frozenset({"config", "device_map", "experts_implementation", "output_loading_info"})
"""Options that offmoe sets itself."""
UNUSABLE = frozenset(
    {
        "adapter_kwargs",
        "disable_mmap",
        "distributed_config",
        "gguf_file",
        "ignore_mismatched_sizes",
        "key_mapping",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "quantization_config",
        "state_dict",
        "subfolder",
        "tp_plan",
        "tp_size",
        "use_safetensors",
        "variant",
    }
)
"""Options that would change which weights are loaded, or where to, without the catalog's knowledge."""
PASSED = frozenset(
    {
        "adapter_name",
        "allow_all_kernels",
        "attn_implementation",
        "device_mesh",
        "force_download",
        "fusion_config",
        "generation_config",
        "kernel_config",
        "proxies",
        "tqdm_class",
        "trust_remote_code",
        "use_kernels",
        "weights_only",
        # transformers accepts these and ignores them, or sets them itself when it is called by one of its own classes
        "_commit_hash",
        "_fast_init",
        "_from_auto",
        "_from_pipeline",
        "from_flax",
        "from_tf",
        "low_cpu_mem_usage",
        "mirror",
        "offload_state_dict",
    }
)
"""Options that go to transformers as they are."""


def check_options(names: Iterable[str], known: Iterable[str] = ()) -> None:
    """Refuse keywords that transformers' `from_pretrained` does not take, or that offmoe cannot honor.

    Args:
        names: Keywords that are to go to transformers.
        known: Keywords of the caller itself, which a misspelt one may have meant.

    Raises:
        ConfigError: The first keyword that cannot be used, with the known one that is spelled most like it.
    """
    for name in names:
        if name == "torch_dtype":
            raise ConfigError("torch_dtype= is transformers' old name; use dtype=.")
        if name in OURS | UNUSABLE:
            why = "offmoe sets it itself" if name in OURS else "offmoe cannot honor it"
            raise ConfigError(f"option {name!r} of transformers: {why}; leave it out")
        if name not in PASSED:
            hint = did_you_mean(name, [*known, *sorted(PASSED)])
            raise ConfigError(
                f"{name!r} is no option of offmoe, nor of transformers' from_pretrained{hint}. To change a value of "
                "the model's config, set it on model.config after loading."
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

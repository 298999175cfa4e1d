"""Load a transformers model without its experts: the rest by transformers' own loader, as if nothing were missing.

What moves: dense weights, from the shards to the device, once; bounded by the disk or the link. The model is an
instance of a throw-away subclass whose constructor deletes the experts' parameters before anything is materialised, so
the loader finds no place for the experts' tensors and never reads them; afterwards the instance becomes a plain object
of the architecture's own class. The subclass carries the class's own names, because conversions and checks of
transformers are keyed on them.

What it must never do: materialise an expert, initialise a missing weight at random, or let `save_pretrained` write a
checkpoint without experts (save.py).
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import transformers

from offmoe.errors import CapacityError, CheckpointError, ConfigError, MissingTensorError, UnsupportedModelError
from offmoe.hf.adapters import expert_parameters, forget_tie
from offmoe.hf.catalog import ExpertCatalog, find_experts, refuse_quantised
from offmoe.hf.save import MODEL_FILES, attach_safe_save
from offmoe.runtime.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "attach_safe_save",
    "build_meta",
    "load_dense",
    "model_class",
    "read_config",
    "require_index",
    "resolve_folder",
]

DEMO = "demo"
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
OURS = frozenset({"config", "device_map", "experts_implementation", "output_loading_info"})
"""Options of transformers' from_pretrained that load_dense sets itself."""
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
"""Options that would change which weights are loaded, or where to, behind the catalog's back."""


def resolve_folder(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: a folder as it is, "demo" the one in the package, else a Hub id, downloaded if need be.

    Raises ConfigError if it is neither a folder nor a Hub id that can be reached, CheckpointError if it is a file.
    """
    name = os.fspath(model)
    if name == DEMO:
        return Path(__file__).parent.parent / "demo" / "model"
    path = Path(os.path.expanduser(name))  # of os.path, because those of Path raise for names that no file can have
    if name and os.path.isdir(path):
        return path
    if name and os.path.exists(path):
        raise CheckpointError(f"{path}: a file, not a model; give the folder that holds config.json and the shards")
    if not isinstance(model, str) or not REPOSITORY.fullmatch(name) or name.startswith("."):
        raise ConfigError(f"model {name!r}: there is no such folder, and a Hub id looks like 'owner/name'")
    return _download(name, revision, token, cache_dir, local_files_only)


def _download(
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=list(MODEL_FILES),
            # subfolders and consolidated.* hold the same weights again, in the publisher's own format
            ignore_patterns=["*/*", "consolidated*"],
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"model {name!r}: access is restricted; accept its terms on the Hub and pass token="
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"model {name!r} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        reason = "local_files_only=True" if local_files_only else "the Hub cannot be reached"
        raise ConfigError(
            f"model {name!r}: not a folder here and not in the Hub cache ({reason}); give the path of a folder, "
            "or download the model once with a network"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"model {name!r}: neither a folder here nor a repository on the Hub (or a token= is needed)"
        ) from error
    except Exception as error:  # the Hub client's releases use different transports, each with errors of its own
        raise CheckpointError(f"model {name!r}: the download failed ({error}); try again, it resumes") from error
    return Path(folder)


def read_config(folder: str | os.PathLike[str]) -> PreTrainedConfig:
    """The model's configuration. Code that comes with a checkpoint is never run.

    Raises CheckpointError if config.json is absent or damaged, UnsupportedModelError if transformers does not know the
    model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a complete model"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from error
    known = values.get("model_type") if isinstance(values, dict) else None
    if not known or not isinstance(known, str):
        raise CheckpointError(f'{path}: has no "model_type", so it is not the config of a transformers model')
    if known not in CONFIG_MAPPING:
        own_code = ", and offmoe does not run a checkpoint's own code" if "auto_map" in values else ""
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} has no model type {known!r}{own_code}; "
            "use a newer transformers, if one knows it"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture's config has validators of its own
        raise CheckpointError(f"{path}: not a valid config of {known!r} ({error}); download it again") from error
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The architecture's own class that generates text; for a config with vision, the one that takes images too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    order = [AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText]
    if getattr(config, "vision_config", None) is not None:
        order.reverse()
    for auto in order:
        classes = auto._model_mapping
        if classes is not None and type(config) in classes:
            found = classes[type(config)]
            cls: type[PreTrainedModel] = found[0] if isinstance(found, (list, tuple)) else found
            return cls
    raise UnsupportedModelError(
        f"transformers has no text-generating class for {type(config).__name__} (model type {config.model_type!r}); "
        "offmoe runs causal, sequence-to-sequence and image-text models"
    )


def require_index(checkpoint: Checkpoint) -> None:
    """MissingTensorError where transformers finds no weights: it takes model.safetensors or what an index names."""
    if not any((checkpoint.folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise MissingTensorError(
            f"{checkpoint.folder}: holds {checkpoint.shards[0].name}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which"
            " says where each tensor is; complete the download (a single shard may simply be renamed)"
        )


def build_meta(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    """The whole model on the meta device, experts included: shapes without bytes. `config` is not changed.

    Raises CheckpointError if no such model can be made from it.
    """
    try:
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))
    except Exception as error:  # sizes and names that contradict each other fail in any way, deep in an architecture
        raise CheckpointError(
            f"{Path(str(config.name_or_path)) / 'config.json'}: does not describe a {cls.__name__} "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    model.eval()
    return model


def load_dense(
    folder: str | os.PathLike[str],
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    catalog: ExpertCatalog,
    *,
    device: str | torch.device,
    dtype: torch.dtype | str | None = None,
    experts_implementation: str = "offmoe",
    **hf_kwargs: object,
) -> PreTrainedModel:
    """Load everything but the experts, in eval mode, as an instance of `cls` whose experts modules have no parameters.

    dtype: of the dense weights; None is the checkpoint's own. hf_kwargs go to transformers' from_pretrained. Raises
    ConfigError for an option that offmoe sets itself or cannot honour, MissingTensorError for weights that are not in
    the checkpoint, CheckpointError for weights that do not fit the model.
    """
    for option in hf_kwargs:
        if option in OURS | UNUSABLE:
            why = "offmoe sets it itself" if option in OURS else "offmoe cannot honour it"
            raise ConfigError(f"option {option!r} of transformers: {why}; leave it out")
    refuse_quantised(folder, config)
    expert_names = frozenset(f"{layer.name}.{param.name}" for layer in catalog.layers for param in layer.layout.params)
    skeleton = _without_experts(cls, expert_names)
    load = cast("Callable[..., tuple[PreTrainedModel, Mapping[str, Iterable[str]]]]", skeleton.from_pretrained)
    try:
        model, report = load(
            folder,
            config=config,
            device_map={"": torch.device(device)},
            dtype="auto" if dtype is None else dtype,
            experts_implementation=experts_implementation,
            output_loading_info=True,
            **hf_kwargs,
        )
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{folder}: the dense weights do not fit on {device} ({error}); free memory there"
        ) from error
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"transformers cannot load {cls.__name__} with these options: {error}") from error
    except (RuntimeError, OSError, KeyError) as error:  # KeyError: an index without its 'metadata'
        if "unable to mmap" in str(error):
            raise CapacityError(
                f"{folder}: transformers maps whole shards, and the system refuses one larger than its memory; split "
                "the checkpoint into smaller shards, or allow it (Linux: sysctl vm.overcommit_memory=1)"
            ) from error
        raise CheckpointError(
            f"{folder}: transformers cannot load the dense weights of {cls.__name__} ({error}); "
            "config.json and the shards are probably not of the same model"
        ) from error
    model.__class__ = cls
    for module in find_experts(model).values():
        for param in expert_parameters(module):
            delattr(module, param)
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingTensorError(
            f"{folder}: the checkpoint has no tensor for {missing[0]!r}{more}; complete the download"
        )
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a weight was left on the meta device"
    _own_memory(model)
    attach_safe_save(model, folder, catalog)
    model.eval()
    return model


def _own_memory(model: PreTrainedModel) -> None:
    """Copy, one by one, the weights that transformers left in mapped shards, as it does on a CPU.

    A shard truncated under a mapping kills the process, and one rewritten changes the model that is running.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.untyped_storage().resizable():  # memory that is not torch's own
            tensor.data = tensor.data.clone()


def _without_experts(cls: type[PreTrainedModel], expert_names: frozenset[str]) -> type[PreTrainedModel]:
    """A subclass of `cls` that looks like it and constructs models without experts' parameters."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        cls.__init__(self, config, *args, **kwargs)
        _strip(self)
        ignored = {_exactly(name, self.base_model_prefix) for name in expert_names}
        self._keys_to_ignore_on_load_unexpected = set(self._keys_to_ignore_on_load_unexpected or ()) | ignored

    names = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), names)


def _strip(model: PreTrainedModel) -> None:
    """Delete experts' parameters. The loader then has no place for their tensors and leaves them in the shards."""
    for name, module in find_experts(model).items():
        if module._non_persistent_buffers_set:
            raise UnsupportedModelError(f"experts {name!r} compute their own buffers, which offmoe does not run yet")
        for param in expert_parameters(module):
            # a plain attribute, which no state dict lists: initialisation looks it up by name, some on a whole block
            setattr(module, param, module._parameters.pop(param).detach().to("meta"))  # type: ignore[union-attr]
            forget_tie(model, f"{name}.{param}")


def _exactly(name: str, prefix: str) -> str:
    """Pattern for one parameter's name as the loader reports it: with or without the base model's prefix."""
    return rf"^(?:{re.escape(prefix)}\.)?{re.escape(name.removeprefix(f'{prefix}.'))}$"

"""Load a transformers model without its experts: the rest by transformers' own loader, as if nothing were missing.

What moves: dense weights, from the shards to the device, once; bounded by the disk or the link. The model is an
instance of a throw-away subclass whose constructor deletes the experts' parameters before anything is materialized, so
the loader finds no place for the experts' tensors and never reads them; afterwards the instance becomes a plain object
of the architecture's own class. The subclass carries the class's own names, because conversions and checks of
transformers are keyed on them.

What it must never do: materialize an expert, initialize a missing weight at random, or let `save_pretrained` write a
checkpoint without experts (save.py).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch.overrides import TorchFunctionMode

from offmoe.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MissingTensorError,
    UnsupportedModelError,
    out_of_memory,
)
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.hub.config_checks import check_config, check_generation, read_object
from offmoe.hf.hub.locate import resolve_folder
from offmoe.hf.load.dense_layers import OffloadedLayers
from offmoe.hf.load.options import check_options, parse_dtype
from offmoe.hf.load.save import attach_safe_save
from offmoe.hf.upstream import forget_tie
from offmoe.storage.checkpoint import INDEX_FILE, PICKLES, SINGLE_FILE, Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "attach_safe_save",
    "build_meta",
    "compute_dtype",
    "load_dense",
    "lone_config",
    "model_class",
    "read_config",
    "require_index",
    "resolve_folder",
]

CONFIG_FILE = "config.json"
PACK_MANIFEST = "offmoe-pack.json"
"""What `offmoe pack` keeps beside the shards it has finished; without a config there, it was interrupted."""
WEIGHTS = (".safetensors", INDEX_FILE, *PICKLES)
"""Endings of the files that make a folder more than a configuration."""


def lone_config(model: str | os.PathLike[str]) -> Path | None:
    """The configuration file that is all there is of a model: a .json file, or that of a folder without weights."""
    path = Path(os.path.expanduser(os.fspath(model)))
    if os.path.isfile(path) and path.suffix == ".json":
        return path
    alone = os.path.isdir(path) and os.path.isfile(path / CONFIG_FILE)
    return path / CONFIG_FILE if alone and not any(n.endswith(WEIGHTS) for n in os.listdir(path)) else None


def read_config(model: str | os.PathLike[str]) -> PreTrainedConfig:
    """The configuration in a folder, or in a file. Code that comes with a checkpoint is never run.

    Raises CheckpointError if config.json is absent, or it or generation_config.json is damaged, UnsupportedModelError
    if transformers does not know the model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(model) if os.path.isfile(model) else Path(model) / CONFIG_FILE
    try:
        values = read_object(path)
    except FileNotFoundError:
        if os.path.exists(path.with_name(PACK_MANIFEST)):
            raise CheckpointError(
                f"{path.parent}: packing into this folder was interrupted; run the same 'offmoe pack' again, and it "
                "goes on where it was"
            ) from None
        raise CheckpointError(f"{path}: is not there; give the folder of a complete model") from None
    known = values.get("model_type")
    if not known or not isinstance(known, str):
        raise CheckpointError(f'{path}: has no "model_type", so it is not the config of a transformers model')
    if known not in CONFIG_MAPPING:
        own_code = ", and offmoe does not run a checkpoint's own code" if "auto_map" in values else ""
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} has no model type {known!r}{own_code}; "
            "use a newer transformers, if one knows it"
        )
    check_config(values, path)
    check_generation(path.parent)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
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
    if checkpoint.shards[0].name != SINGLE_FILE and not (checkpoint.folder / INDEX_FILE).exists():
        raise MissingTensorError(
            f"{checkpoint.folder}: holds {checkpoint.shards[0].name}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which"
            " says where each tensor is; complete the download (a single shard may simply be renamed)"
        )


class _NoInitialization(TorchFunctionMode):
    """Leaves as they are tensors that have no values: initializing them costs more than making 60,000 experts."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def build_meta(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedModel:
    """The whole model on the meta device, experts included: shapes without bytes. `config` is not changed.

    Raises CheckpointError if no such model can be made from it.
    """
    name = Path(str(config.name_or_path))
    try:
        with torch.device("meta"), _NoInitialization():
            model = cls(copy.deepcopy(config))
    except Exception as error:  # sizes and names that contradict each other fail in any way, deep in an architecture
        if out_of_memory(error):
            raise
        raise CheckpointError(
            f"{name if name.suffix == '.json' else name / CONFIG_FILE}: does not describe a {cls.__name__} "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    model.eval()
    return model


def compute_dtype(dtype: str | torch.dtype | None, hf_config: PreTrainedConfig, unsaid: torch.dtype) -> torch.dtype:
    """The dtype to compute in: as asked, else the checkpoint's own, else `unsaid`."""
    if dtype in (None, "auto"):
        own = getattr(hf_config, "dtype", None) or getattr(hf_config.get_text_config(), "dtype", None)
        dtype = own or unsaid
    assert dtype is not None
    return parse_dtype(dtype)


def load_dense(
    folder: str | os.PathLike[str],
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    catalog: ExpertCatalog,
    *,
    device: str | torch.device,
    dtype: torch.dtype | str | None = None,
    experts_implementation: str = "offmoe",
    offloaded: OffloadedLayers | None = None,
    called: str | os.PathLike[str] | None = None,
    **hf_kwargs: object,
) -> PreTrainedModel:
    """Load everything but the experts, in eval mode, as an instance of `cls` whose experts modules have no parameters.

    dtype: of the dense weights; None is the checkpoint's own. offloaded: layers whose weights are to come and go;
    closing it is the caller's. called: what the model says it was loaded from, if that is not `folder`. hf_kwargs go to
    transformers' from_pretrained. Raises
    ConfigError for an option that offmoe sets itself or cannot honor, MissingTensorError for weights that are not in
    the checkpoint, CheckpointError for weights that do not fit the model.
    """
    check_options(hf_kwargs)
    config, view = _as_dense(config), catalog.view
    source: object = folder
    if view.encoded:  # values by dense names, decoded when transformers takes them
        names = [name for name in view.tensors if not catalog.keys.issuperset(view.raw_names(name))]
        source, hf_kwargs["state_dict"] = None, view.lazy(names, torch.device(device))
        dtype = dtype or config.dtype or torch.bfloat16
    skeleton = _without_experts(cls, catalog.parameters)
    if offloaded is not None:
        # device_map names parameters; the loader checks it against module names unless this list is there
        setattr(skeleton, "_no_placement_params", getattr(cls, "_no_placement_params", None) or [])  # noqa: B010
    load = cast("Callable[..., tuple[PreTrainedModel, Mapping[str, Iterable[str]]]]", skeleton.from_pretrained)
    try:
        model, report = load(
            source,
            config=config,
            device_map={"": torch.device(device)} if offloaded is None else offloaded.device_map,
            offload_folder=None if offloaded is None else offloaded.folder,
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
        adapter = require_adapter(module)
        adapter.settle(module)
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingTensorError(
            f"{folder}: the checkpoint has no tensor for {missing[0]!r}{more}; complete the download"
        )
    if offloaded is not None:
        offloaded.take_over(model)
    absent = {n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta}
    assert absent == (offloaded.names if offloaded else set()), "a weight was left on the meta device"
    _own_memory(model)
    if source is None:
        _name_source(model, folder, called or folder, hf_kwargs)
    attach_safe_save(model, folder, catalog)
    model.eval()
    return model


def _as_dense(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config that does not say that the checkpoint is quantized, so that no quantizer of transformers takes part."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _name_source(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    called: str | os.PathLike[str],
    options: Mapping[str, object],
) -> None:
    """What transformers does only for a model that it loads from a folder itself."""
    model.config.name_or_path = model.name_or_path = str(called)
    if model.can_generate() and options.get("generation_config") is None:
        with suppress(OSError):  # no file: what the class has made of the config
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def _own_memory(model: PreTrainedModel) -> None:
    """Copy, one by one, the weights that transformers left in mapped shards, as it does on a CPU.

    A shard truncated under a mapping kills the process, and one rewritten changes the model that is running.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and not tensor.untyped_storage().resizable():  # memory that is not torch's own
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
        if any(part._non_persistent_buffers_set for part in module.modules()):
            raise UnsupportedModelError(f"experts {name!r} compute their own buffers, which offmoe does not run yet")
        adapter = require_adapter(module)
        for param in adapter.places(module):
            forget_tie(model, f"{name}.{param}")
        adapter.strip(module)


def _exactly(name: str, prefix: str) -> str:
    """Pattern for one parameter's name as the loader reports it: with or without the base model's prefix."""
    return rf"^(?:{re.escape(prefix)}\.)?{re.escape(name.removeprefix(f'{prefix}.'))}$"

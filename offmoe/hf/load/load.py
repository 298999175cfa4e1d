"""Load a transformers model without its experts: transformers' own loader loads the rest, as if nothing were missing.

The loader reads the dense weights from the shards to the device once. The model is first an instance of a throw-away
subclass (skeleton.py) whose constructor deletes the experts' parameters before anything is materialized. So the loader
finds no place for the experts' tensors and never reads them. Afterwards the instance becomes an object of the
architecture's own class. A weight that is missing from the checkpoint is an error, never a random value.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.device.pages import empty_tensor
from offmoe.errors import CapacityError, CheckpointError, ConfigError, MissingTensorError, UnsupportedModelError
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.load.dense_layers import OffloadedLayers
from offmoe.hf.load.options import check_forwarded, parse_dtype
from offmoe.storage.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint

METADATA = re.compile(rb'"metadata"\s*:\s*\{')


def require_index(checkpoint: Checkpoint) -> None:
    """Check that transformers will find the weights: it reads model.safetensors or the files that an index names.

    Raises:
        MissingTensorError: the folder has neither.
        CheckpointError: transformers cannot read the index.
    """
    if checkpoint.shards[0].name != SINGLE_FILE and not (checkpoint.folder / INDEX_FILE).exists():
        raise MissingTensorError(
            f"{checkpoint.folder}: holds {checkpoint.shards[0].name}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which"
            " says where each tensor is; complete the download (a single shard may simply be renamed)"
        )
    index = checkpoint.folder / INDEX_FILE
    if checkpoint.shards[0].name != SINGLE_FILE and not METADATA.search(index.read_bytes()):
        raise CheckpointError(
            f'{index}: has no "metadata" object, without which transformers reads no index; download it again, or write'
            ' "metadata": {} beside its "weight_map"'
        )


def load_dense(
    folder: str | os.PathLike[str],
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    catalog: ExpertCatalog,
    *,
    device: str | torch.device,
    experts_implementation: str,
    dtype: torch.dtype | str | None = None,
    offloaded: OffloadedLayers | None = None,
    name_or_path: str | os.PathLike[str] | None = None,
    generation_folder: str | os.PathLike[str] | None = None,
    packed: Collection[str] = (),
    **hf_kwargs: object,
) -> PreTrainedModel:
    """Load everything but the experts.

    Args:
        folder: holds config.json and the shards.
        config: the model's configuration.
        cls: the architecture's class.
        catalog: the experts of the checkpoint.
        device: where the dense weights go.
        experts_implementation: name of the registered function that computes the experts.
        dtype: of the dense weights; None means the checkpoint's own.
        offloaded: decoder layers whose weights are on the device only while they run. The caller closes it.
        name_or_path: where the model says that it comes from; None means `folder`.
        generation_folder: the folder of generation_config.json, if transformers does not load from `folder` itself;
            None: what the configuration says is used.
        packed: names of weights in `catalog.stored` whose values nobody will read; those that are not `offloaded` are
            not decoded, and take no memory.
        hf_kwargs: further options of transformers' from_pretrained.

    Returns:
        An instance of `cls` in eval mode whose experts modules have no parameters.

    Raises:
        ConfigError: an option that offmoe sets itself or cannot honor.
        MissingTensorError: a dense weight is not in the checkpoint.
        CheckpointError: the weights do not fit the model.
        CapacityError: they do not fit the device, or the system refuses to map a shard.
    """
    check_forwarded(hf_kwargs)
    source: str | os.PathLike[str] | None = folder
    if catalog.view.needs_decoding:  # then transformers gets a state dict whose values are decoded when it takes them
        source, dtype = None, dtype or config.dtype or torch.bfloat16
        unread = [name for name in packed if offloaded is None or name not in offloaded.names]
        hf_kwargs["state_dict"] = {**_decoded(catalog, torch.device(device)), **_unread(catalog, unread, dtype)}
    skeleton = without_experts(cls, catalog.parameters)
    hf_kwargs |= _placement(skeleton, torch.device(device), offloaded)
    load = cast("Callable[..., tuple[PreTrainedModel, Mapping[str, Iterable[str]]]]", skeleton.from_pretrained)
    with _loader_errors(folder, cls.__name__, device):
        model, report = load(
            source,
            config=_as_dense(config),
            dtype="auto" if dtype is None else dtype,
            experts_implementation=experts_implementation,
            output_loading_info=True,
            **hf_kwargs,
        )
    _check_complete(folder, report["missing_keys"], catalog.view.checkpoint.index_fault)
    _settle(model, cls, offloaded)
    if source is None:
        _name_source(model, generation_folder, name_or_path or folder, hf_kwargs)
    return model


def _decoded(catalog: ExpertCatalog, device: torch.device) -> Mapping[str, object]:
    """The dense tensors of a quantized checkpoint, decoded on `device` when they are taken."""
    view = catalog.view
    names = [name for name in view.tensors if not catalog.keys.issuperset(view.raw_names(name))]
    return view.lazy(names, device)


def _unread(catalog: ExpertCatalog, names: Collection[str], dtype: torch.dtype | str) -> Mapping[str, object]:
    """By tensor, what the loader takes for dense weights that are never read: one zero, seen as their shape."""
    if not names:
        return {}
    zero = torch.zeros((), dtype=parse_dtype(dtype))
    tensors = [catalog.decoded[name] for name in names]
    return {tensor: zero.expand(catalog.view.tensors[tensor].shape) for tensor in tensors}


def _placement(
    skeleton: type[PreTrainedModel], device: torch.device, offloaded: OffloadedLayers | None
) -> dict[str, object]:
    """The options of from_pretrained that say where weights go."""
    if offloaded is None:
        return {"device_map": {"": device}}
    # device_map names parameters; the loader checks it against module names unless this list is there
    setattr(skeleton, "_no_placement_params", getattr(skeleton, "_no_placement_params", None) or [])  # noqa: B010
    return {"device_map": offloaded.device_map, "offload_folder": offloaded.folder}


def _settle(model: PreTrainedModel, cls: type[PreTrainedModel], offloaded: OffloadedLayers | None) -> None:
    """Make a model that was just loaded an ordinary instance of `cls` in eval mode, with weights in its own memory."""
    model.__class__ = cls
    for module in find_experts(model).values():
        require_adapter(module).settle(module)
    if offloaded is not None:
        offloaded.take_over(model)
    absent = {n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta}
    assert absent == (offloaded.names if offloaded else set()), "a weight was left on the meta device"
    _own_memory(model)
    model.eval()


@contextmanager
def _loader_errors(folder: str | os.PathLike[str], name: str, device: str | torch.device) -> Iterator[None]:
    """Turn whatever transformers' loader raises in the block into an error of offmoe about the model class `name`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"{folder}: the dense weights do not fit on {device} ({error}); free memory there, or lower --device-memory"
        ) from error
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"transformers cannot load {name} with these options: {error}") from error
    except (RuntimeError, OSError, KeyError) as error:  # KeyError: an index without its 'metadata'
        if "unable to mmap" in str(error):
            raise CapacityError(
                f"{folder}: transformers maps whole shards, and the system refuses one larger than its memory; split "
                "the checkpoint into smaller shards, or allow it (Linux: sysctl vm.overcommit_memory=1)"
            ) from error
        raise CheckpointError(
            f"{folder}: transformers cannot load the dense weights of {name} ({error}); "
            "config.json and the shards are probably not of the same model"
        ) from error


def _check_complete(folder: str | os.PathLike[str], missing_keys: Iterable[str], index_fault: str) -> None:
    missing = sorted(missing_keys)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingTensorError(
            f"{folder}: the checkpoint has no tensor for {missing[0]!r}{more}; complete the download{index_fault}"
        )


def _as_dense(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the configuration without quantization, so that no quantizer of transformers takes part."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _name_source(
    model: PreTrainedModel,
    generation_folder: str | os.PathLike[str] | None,
    name_or_path: str | os.PathLike[str],
    options: Mapping[str, object],
) -> None:
    """Set what transformers sets only on a model that it loads from a folder itself: name and generation config."""
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    if generation_folder is not None and model.can_generate() and options.get("generation_config") is None:
        with suppress(OSError):  # without the file, the model keeps what its class made of the config
            model.generation_config = transformers.GenerationConfig.from_pretrained(generation_folder)


def _own_memory(model: PreTrainedModel) -> None:
    """Copy, one by one, the weights that transformers left in mapped shards; on a CPU it leaves all of them there.

    Truncating a mapped shard kills the process, and rewriting it changes the running model.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and not tensor.untyped_storage().resizable():  # memory that is not torch's own
            own = empty_tensor(tensor.shape, tensor.dtype) if tensor.is_contiguous() else torch.empty_like(tensor)
            tensor.data = own.copy_(tensor.data)


def without_experts(cls: type[PreTrainedModel], expert_names: frozenset[str]) -> type[PreTrainedModel]:
    """A subclass of `cls`, under the same name, that constructs models without experts' parameters.

    Args:
        cls: the architecture's class.
        expert_names: full names of all experts' parameters; the loader then does not report them as unexpected.
    """

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
    """Delete the experts' parameters. The loader then has no place for their tensors and leaves them in the shards."""
    for name, module in find_experts(model).items():
        if any(part._non_persistent_buffers_set for part in module.modules()):
            raise UnsupportedModelError(f"experts {name!r} compute their own buffers, which offmoe does not run yet")
        adapter = require_adapter(module)
        for param in adapter.places(module):
            model.all_tied_weights_keys.pop(f"{name}.{param}", None)
        adapter.strip(module)


def _exactly(name: str, prefix: str) -> str:
    """Regular expression for one parameter's name as the loader reports it: with or without the base prefix."""
    return rf"^(?:{re.escape(prefix)}\.)?{re.escape(name.removeprefix(f'{prefix}.'))}$"

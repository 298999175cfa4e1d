"""Make `save_pretrained` safe for a model whose experts are not in it: copy the source checkpoint, or refuse.

Stock `save_pretrained` writes the parameters that the model has, and these lack the experts. So the model's instance
gets a `save_pretrained` of its own. As long as no dense weight and no configuration was changed since loading, the
source checkpoint is the model, byte for byte, and is copied; the disk bounds that. Otherwise it refuses. It never
writes a checkpoint without experts, never loses a change, and never leaves half a checkpoint that looks whole.
"""

from __future__ import annotations

import os
import shutil
import types
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.errors import ConfigError, ShardChangedError
from offmoe.files import replacing
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.hub.model_files import side_files
from offmoe.storage.checkpoint import INDEX_FILE, Checkpoint

HONORED: dict[str, tuple[object, ...]] = {
    "state_dict": (None,),
    "push_to_hub": (False,),
    "variant": (None,),
    "token": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "safe_serialization": (True,),
    "distributed_checkpoint": (False,),
}
"""Options of save_pretrained, with the values under which a copy is right."""


@dataclass(frozen=True, eq=False)
class SourceCopy:
    """The `save_pretrained` of one loaded model, bound to it."""

    folder: Path
    """The checkpoint that the model was loaded from."""
    keys: frozenset[str]
    """Names of the experts' tensors in it."""
    weights: dict[str, tuple[weakref.ref[torch.Tensor], int]]
    """Every dense tensor at load time, with its version counter, which counts changes in place."""
    config: dict[str, object]
    """The configuration at load time."""
    generation_config: dict[str, object] | None
    """The generation configuration at load time."""
    gguf: Path | None = None
    """The file, if the checkpoint is GGUF."""
    changed_config: PreTrainedConfig | None = None
    """The configuration to write, if it is not the one in `folder`: the model was loaded with other values."""

    def __call__(
        self,
        model: PreTrainedModel,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        **options: object,
    ) -> None:
        """Copy the checkpoint that the model was loaded from, experts included.

        Args:
            model: the model.
            save_directory: the folder to write to.
            is_main_process: write nothing if False, as in transformers.
            options: further options of transformers' save_pretrained.

        Raises:
            ConfigError: weights or configuration were changed since loading, an option needs the weights rewritten, or
                the folder is the source or holds another checkpoint.
        """
        for option, value in options.items():
            if not any(value is allowed for allowed in HONORED.get(option, ())):
                raise ConfigError(
                    f"save_pretrained({option}={value!r}): the experts of this model are not in it, so its "
                    "checkpoint can only be copied as it is; leave the option out, or load the model with stock "
                    "transformers to convert it"
                )
        if self.gguf is not None:
            raise ConfigError(
                f"save_pretrained: this model was loaded from the GGUF file {self.gguf}, and save_pretrained writes "
                "safetensors; copy the file itself"
            )
        self._refuse_changes(model)
        if is_main_process:
            _copy(self.folder, Path(save_directory), self.keys)
            if self.changed_config is not None:
                self.changed_config.save_pretrained(save_directory)
            if _generation(model) != self.generation_config:
                model.generation_config.save_pretrained(save_directory)

    def _refuse_changes(self, model: PreTrainedModel) -> None:
        now = _dense(model)
        changed = sorted(now.keys() ^ self.weights.keys()) + [
            name
            for name, (tensor, version) in self.weights.items()
            if name in now and (tensor() is not now[name] or now[name]._version != version)
        ]
        if changed:
            raise ConfigError(
                f"save_pretrained: weight {changed[0]!r} was changed since loading, and copying the checkpoint would "
                "lose that; save model.state_dict() yourself, or change the model under stock transformers"
            )
        config = model.config.to_dict()
        different = [k for k in sorted(config.keys() | self.config.keys()) if config.get(k) != self.config.get(k)]
        if different:
            raise ConfigError(
                f"save_pretrained: config.{different[0]} was changed since loading, and copying the checkpoint would "
                "lose that; undo it, or edit config.json in the copy"
            )


def attach_safe_save(
    model: PreTrainedModel,
    source_folder: str | os.PathLike[str],
    catalog: ExpertCatalog,
    changed_config: PreTrainedConfig | None = None,
) -> None:
    """Give a model that was just loaded a `save_pretrained` that copies its source or refuses.

    Identity and version counters show changes, so a change through `tensor.data`, which bypasses them, is not seen.

    Args:
        model: the model; only this instance is changed.
        source_folder: the checkpoint that it was loaded from.
        catalog: the checkpoint's experts.
        changed_config: the configuration to write, if it is not the checkpoint's.
    """
    weights = {name: (weakref.ref(tensor), tensor._version) for name, tensor in _dense(model).items()}
    checkpoint = catalog.view.checkpoint
    copier = SourceCopy(
        Path(source_folder).absolute(),
        catalog.keys,
        weights,
        model.config.to_dict(),
        _generation(model),
        None if checkpoint.gguf is None else checkpoint.model,
        changed_config,
    )
    # on the instance, and bound: a deep copy of the model binds to the copy
    setattr(model, "save_pretrained", types.MethodType(copier, model))  # noqa: B010 -- it is a method of the class


def _dense(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)
    }


def _generation(model: PreTrainedModel) -> dict[str, object] | None:
    config = getattr(model, "generation_config", None)
    return None if config is None else config.to_dict()


def _copy(source: Path, out: Path, keys: frozenset[str]) -> None:
    checkpoint = Checkpoint.open(source)
    if not keys <= checkpoint.tensors.keys():
        raise ShardChangedError(f"{source}: the checkpoint lost experts since the model was loaded from it; restore it")
    if out.exists() and (not out.is_dir() or out.resolve() == source.resolve()):
        raise ConfigError(f"save_pretrained: {out} is the model's own source or a file; give another folder")
    weights = [shard.relative_to(source).as_posix() for shard in checkpoint.shards]
    others = side_files(source)
    if INDEX_FILE in others and weights == ["model.safetensors"]:
        others.remove(INDEX_FILE)  # of another set of shards, which the source's own loader ignores too
    out.mkdir(parents=True, exist_ok=True)
    foreign = sorted(
        p.name
        for p in out.iterdir()
        if p.name.endswith((".safetensors", ".safetensors.index.json")) and p.name not in (*weights, *others)
    )
    if foreign:
        raise ConfigError(f"save_pretrained: {out} holds another checkpoint ({foreign[0]}); give an empty folder")
    for name in (*weights, *others):  # index and configs last: without them the folder is no checkpoint
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            shutil.copyfile(source / name, temporary)

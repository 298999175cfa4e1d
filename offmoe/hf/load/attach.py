"""Everything that offmoe changes on a user's model. Only the instance changes, never a class of transformers.

* Experts modules have no parameters. `experts_implementation="offmoe"`, or a forward of their adapter, calls the
  `AttachedExperts` of the module.
* `model.offload` is the handle. `generate` and `forward` hold the model for one user and are steps of the runtime.
* A prompt that does not fit is prefilled in chunks (prefill.py).
* `.to()` and `.half()`, copying, pickling, replicas, tracing and other experts implementations are refused.
* The encoder and the decoder of a model that has both get a `forward` that is one step each.
* With `exactness="numeric"` on a CPU, linear layers, RMS norms, plain attention and plain routers get a `forward` that
  the C kernels compute for a few rows (kernel_linears.py, kernel_norms.py, token_attention.py, kernel_routers.py), and
  `attn_implementation` "sdpa" becomes "offmoe_sdpa" (grouped_attention.py). Decoder layers made of these get one, too
  (token_layers.py).
* `save_pretrained` copies the checkpoint (save.py).
* Decoder layers get hooks that keep a residual for predictions (hf/predict) or stream offloaded weights
  (dense_layers.py).

Must never know a family.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from offmoe.compute.cpu_slot import CpuSlot
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.torch_ffn import ExpertMath, combine
from offmoe.errors import ConfigError
from offmoe.hf.adapters.find import require_adapter
from offmoe.hf.adapters.reroute import Choose
from offmoe.hf.catalog.catalog import CatalogLayer
from offmoe.hf.load.eager import has_tangent, require_eager, uncompiled
from offmoe.hf.load.prefill import ChunkOf, chunk_prefill
from offmoe.hf.upstream import ALL_EXPERTS_FUNCTIONS
from offmoe.runtime.executor import ExpertExecutor

IMPLEMENTATION = "offmoe"
ATTRIBUTE = "_offmoe"
"""Name of the attribute of an experts module that holds its `AttachedExperts`."""


def expert_layers(stored: Sequence[CatalogLayer], modules: Sequence[nn.Module]) -> list[ExpertLayer]:
    """Everything about each MoE layer that moving and computing its experts needs.

    Args:
        stored: the catalog's layers.
        modules: the experts module of each, as loaded.
    """
    shared: dict[CpuSlot, CpuSlot] = {}

    def bound(index: int, layer: CatalogLayer, module: nn.Module) -> ExpertLayer:
        adapter, slot = require_adapter(module), layer.cpu_slot
        return ExpertLayer(
            index=index,
            layout=layer.layout,
            assembly=layer.assembly,
            math=adapter.math(module),
            decode=layer.decode,
            cpu_slot=None if slot is None else shared.setdefault(slot, slot),
            order=adapter.order,
            unlike={expert: bound(index, other, module) for expert, other in layer.unlike.items()},
        )

    return [bound(i, layer, module) for i, (layer, module) in enumerate(zip(stored, modules, strict=True))]


class AttachedExperts:
    """The experts of one MoE layer, computed by an executor."""

    def __init__(self, executor: ExpertExecutor, layer: ExpertLayer) -> None:
        self._executor, self.layer = executor, layer
        self.choose: Choose | None = None
        """Chooses the ids in place of the router's; None: the router's stay."""

    def routed(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.choose is None else self.choose(ids)

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return _run_uncompiled(self, hidden, ids)
        return self.run(hidden, ids)

    def run(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows [T * k, H] in router order of hidden [T, H], or [T * k, H], and ids [T, k]."""
        self._check(hidden)
        return self._executor.run(self.layer, hidden, ids)

    def summed(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """The weighted sum [T, H] where the device computes it without the host, as `ExpertExecutor.run_summed`."""
        if torch.compiler.is_compiling() or self._executor.decode is None:
            return None
        self._check(hidden)
        return self._executor.run_summed(self.layer, hidden, ids, weights)

    def _check(self, hidden: torch.Tensor) -> None:
        require_eager(hidden)
        if (torch.is_grad_enabled() and hidden.requires_grad) or has_tangent(hidden):
            raise ConfigError(
                "gradients do not pass through experts outside the device. Use torch.no_grad() or model.generate()."
            )

    def __reduce_ex__(self, protocol: object) -> Any:
        return _refuse_copy()

    def with_math(self, math: ExpertMath) -> AttachedExperts:
        return AttachedExperts(self._executor, self.layer.with_math(math))


_run_uncompiled = uncompiled(AttachedExperts.run)


def attach(module: nn.Module, executor: ExpertExecutor, layer: ExpertLayer) -> None:
    """Let an experts module compute through `executor`. layer: the module's."""
    experts = AttachedExperts(executor, layer)
    setattr(module, ATTRIBUTE, experts)
    require_adapter(module).connect(module, experts)


def offmoe_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The registered function: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    experts: AttachedExperts = getattr(module, ATTRIBUTE)
    ids = experts.routed(top_k_index)
    summed = experts.summed(hidden_states, ids, top_k_weights)
    if summed is not None:
        return summed
    rows = experts(hidden_states, ids)  # [T * k, H]
    return combine(rows, top_k_weights, hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offmoe_experts_forward)


Step = Callable[[Mapping[str, Any]], AbstractContextManager[None]]
"""Takes the arguments of a call of the model, by name; the call happens within the result."""


class Handle(Protocol):
    """The part of `offmoe.handle.Offload` that surrounds calls of the model."""

    def in_use(self) -> AbstractContextManager[None]: ...

    def step(self, arguments: Mapping[str, Any], is_encoder: bool = False) -> AbstractContextManager[None]: ...

    @property
    def prefill_chunk(self) -> ChunkOf: ...


def attach_handle(model: PreTrainedModel, handle: Handle) -> None:
    """Put the handle at `model.offload`, let it surround the model's calls, and refuse calls that would break it."""
    parts = encoder_and_decoder(model)
    for part in parts:  # one step each: generate() runs the encoder by itself
        is_encoder = part is parts[0]
        _surround(part, "forward", handle, functools.partial(handle.step, is_encoder=is_encoder))
    _surround(model, "forward", handle, _no_step if parts else handle.step)
    _surround(model, "generate", handle, _no_step, disable_compile=True)  # a graph cannot call the planner
    chunk_prefill(model, handle.prefill_chunk)
    reference = weakref.ref(model)

    def apply(convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        return _refuse_move(reference(), convert)

    changes = {
        "offload": handle,
        "_apply": apply,  # what .to(), .half() and .cuda() call
        "__reduce_ex__": _refuse_copy,  # what copy and pickle call
        "_replicate_for_data_parallel": _refuse_replicas,  # what DataParallel calls for several devices
        "set_experts_implementation": _refuse_experts,
    }
    for name, value in changes.items():
        object.__setattr__(model, name, value)


def encoder_and_decoder(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The encoder and the decoder of a model that has both, else ()."""
    return (model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else ()


def _no_step(*_: object) -> AbstractContextManager[None]:
    return nullcontext()


def _surround(module: nn.Module, method: str, handle: Handle, step: Step, **defaults: object) -> None:
    """Let calls of a module's method hold the handle and be a `step`. defaults: arguments that a call may leave out."""
    original = getattr(type(module), method)
    reference = weakref.ref(module)
    names = list(inspect.signature(original).parameters)[1:]

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        for rows in (arguments.get("input_ids"), arguments.get("inputs_embeds")):
            if rows is not None:
                require_eager(rows)
        if method == "forward":
            _refuse_training(reference())
        own = isinstance(arguments.get("custom_generate"), str)  # its code gets what the caller gives, and no more
        with handle.in_use(), step(arguments):
            return original(reference(), *args, **{**({} if own else defaults), **kwargs})

    run_uncompiled = uncompiled(run)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return run_uncompiled(*args, **kwargs) if torch.compiler.is_compiling() else run(*args, **kwargs)

    object.__setattr__(module, method, call)


def redirect_forward(
    model: nn.Module, instead: Callable[[Callable[..., Any], Mapping[str, Any]], Any]
) -> Callable[[], None]:
    """Let `instead(forward, arguments)` take the calls of a model's forward. Arguments are by name.

    Returns:
        The function that undoes this.
    """
    forward = model.forward
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return instead(forward, {**dict(zip(names, args, strict=False)), **kwargs})

    object.__setattr__(model, "forward", call)
    return functools.partial(object.__setattr__, model, "forward", forward)


def _refuse_move(model: nn.Module | None, convert: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """The model, if `convert` leaves device and dtype as they are; else ConfigError."""
    assert model is not None
    before = next(model.parameters()).detach()[:0]
    after = convert(before)
    if (after.device, after.dtype) != (before.device, before.dtype):
        raise ConfigError(
            f"the model stays on {before.device} in {before.dtype}: its experts are in slots there. "
            "Load it again with from_pretrained(device=..., dtype=...)."
        )
    return model


def _refuse_copy(*_: object) -> Any:
    raise ConfigError(
        "the model cannot be copied or pickled: its experts are slots, files and threads of this process. "
        "Load it once more with from_pretrained, or save_pretrained it."
    )


def _refuse_training(model: nn.Module | None) -> None:
    """ConfigError if a forward pass is meant to train: in training mode, with gradients that nothing would get."""
    assert model is not None
    if not model.training or not torch.is_grad_enabled() or any(p.requires_grad for p in model.parameters()):
        return
    raise ConfigError(
        "the model is in training mode with gradients enabled, and experts outside the device cannot be trained. Call "
        "model.eval(), or run it under torch.no_grad()."
    )


def _refuse_replicas(*_: object) -> Any:
    raise ConfigError(
        "the model cannot be replicated by DataParallel: its experts are slots of one device. Load one model per "
        "device, each in a process of its own."
    )


def _refuse_experts(*_: object, **__: object) -> None:
    raise ConfigError(
        "the experts of this model are not in it, so no other experts implementation can run. Load the model "
        "with stock transformers for that."
    )


def reroute(module: nn.Module, choose: Choose) -> Callable[[], None]:
    """Let an experts module, of ours or of stock transformers, compute with the ids that `choose` gives.

    A module of stock transformers takes ids of experts only, or `null_ids` of its adapter.

    Returns:
        The function that undoes this, without a trace.
    """
    experts: AttachedExperts | None = getattr(module, ATTRIBUTE, None)
    if experts is None:
        return require_adapter(module).reroute(module, choose).remove
    assert experts.choose is None, "already rerouted"
    experts.choose = choose
    return functools.partial(setattr, experts, "choose", None)

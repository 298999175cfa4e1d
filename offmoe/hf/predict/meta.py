"""Tell which layers' experts can be predicted before any weight is loaded: one forward pass on the meta device.

The pass computes shapes only and takes tenths of a second; the experts do nothing in it. It shows how each router is
fed. That the router then gives the right ids is proven when the model first runs (route_recorder.py). An architecture
whose forward looks at values cannot run on the meta device; the answer is then "unknown", never an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from offmoe.hf.adapters.find import adapter_of
from offmoe.hf.predict.route_recorder import RouteRecorder

NUM_TOKENS = 4
"""Length of the prompt without values. More than one, so that a batch of tokens cannot be taken for a single token."""


def unpredictable_reasons(meta_model: PreTrainedModel, experts: Sequence[nn.Module]) -> tuple[str | None, ...] | None:
    """Say for each MoE layer why its experts cannot be predicted.

    Args:
        meta_model: the model on the meta device, experts included.
        experts: its experts modules by MoE layer.

    Returns:
        Per MoE layer a reason, or None if the layer can be predicted. None instead of the tuple if only a run of the
        model with weights can tell.
    """
    if any(map(_routes_itself, experts)):  # then the router is inside the module that does nothing here
        return None
    ids = torch.zeros((1, NUM_TOKENS), dtype=torch.int64, device="meta")  # [batch, length]
    inputs = {"input_ids": ids}
    if meta_model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    recorder = RouteRecorder(meta_model, experts, prove=False)
    recorder.start()
    for module in experts:
        object.__setattr__(module, "forward", _nothing)  # on this instance, which holds no weights
    try:
        with torch.no_grad():
            meta_model(**inputs)
    except Exception:  # an architecture may do anything with values that are absent
        return None
    finally:
        for module in experts:
            object.__delattr__(module, "forward")
        probe = recorder.finish()
    return probe.reasons


def _routes_itself(module: nn.Module) -> bool:
    adapter = adapter_of(module)
    routing = None if adapter is None else adapter.routing(module)
    return routing is not None and routing.router is not None


def _nothing(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(hidden_states)

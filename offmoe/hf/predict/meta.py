"""Which layers' experts can be predicted, told without weights: one forward of the model on the meta device.

Nothing moves and nothing is computed but shapes; bounded by the number of operations of a forward, tenths of a second.
The experts themselves do nothing here. What is found is how a router is fed, not that it gives the right ids: that is
proven (wiring.py) when the model first runs. Must never fail an inspection: an architecture whose forward looks at
values cannot be told about, and that is the answer then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from offmoe.hf.adapters.find import adapter_of
from offmoe.hf.predict.wiring import WiringRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 4
"""Of the prompt that has no values: more than one, so that a batch of tokens cannot be taken for one."""


def foresee(meta_model: PreTrainedModel, experts: Sequence[nn.Module]) -> tuple[str | None, ...] | None:
    """For each MoE layer why it cannot be predicted, or None if it can; None for all if only weights can tell.

    meta_model: on the meta device, as built; experts: its experts modules by MoE layer.
    """
    if any(map(_routes_itself, experts)):  # then the router is inside of what must do nothing
        return None
    ids = torch.zeros((1, TOKENS), dtype=torch.int64, device="meta")
    inputs = (
        {"input_ids": ids, "decoder_input_ids": ids} if meta_model.config.is_encoder_decoder else {"input_ids": ids}
    )
    recorder = WiringRecorder(meta_model, experts, prove=False)
    recorder.start()
    for module in experts:
        object.__setattr__(module, "forward", _nothing)  # of this instance, which holds no weights
    try:
        with torch.no_grad():
            meta_model(**inputs)
    except Exception:  # whatever an architecture does with values that are not there
        return None
    finally:
        for module in experts:
            object.__delattr__(module, "forward")
        wiring = recorder.finish()
    return wiring.reasons


def _routes_itself(module: nn.Module) -> bool:
    adapter = adapter_of(module)
    routing = None if adapter is None else adapter.routing(module)
    return routing is not None and routing.router is not None


def _nothing(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(hidden_states)

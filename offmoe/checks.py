"""Checks of options, each a sentence that names the option and what would work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offmoe.errors import ConfigError
from offmoe.types import CacheShape

LAG_ONE: dict[str, Any] = {"prefetch": 0, "on_miss": "fetch"}
"""Options that lag=1 takes: every miss gets a slot that was named before, and nothing else gives slots to experts."""


def check_counts(subject: str, counts: Sequence[Sequence[float]], shape: CacheShape) -> None:
    """ConfigError if there is not one number per expert of the model. subject: begins the message."""
    if tuple(map(len, counts)) != shape.experts:
        raise ConfigError(
            f"{subject} counted on another model: {len(counts)} layers of {sorted(set(map(len, counts)))} experts; "
            f"this one has {shape.layers} of {sorted(set(shape.experts))}."
        )


def one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    """ConfigError unless the value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{option}={value!r} is unknown. Use one of: {', '.join(allowed)}.")


def check_lag(lag: object, **options: object) -> None:
    """ConfigError unless the lag is 0, or 1 with the options that it takes. options: those of LAG_ONE."""
    if type(lag) is not int or lag not in (0, 1):
        raise ConfigError(f"lag={lag!r} must be 0 or 1.")
    for name, value in LAG_ONE.items() if lag else ():
        if options[name] != value:
            raise ConfigError(f"lag=1 takes {name}={value!r}, not {options[name]!r}. Use that, or lag=0.")


def check_graphs(cuda_graphs: object, lag: int) -> None:
    """ConfigError unless graphs are off, or asked for together with lag=1."""
    if cuda_graphs is not False and cuda_graphs != "auto":
        raise ConfigError(f"cuda_graphs={cuda_graphs!r} must be False or 'auto'.")
    if cuda_graphs and lag != 1:
        raise ConfigError("cuda_graphs='auto' takes lag=1: a graph cannot ask the host which experts are next.")


def per_layer(option: str, slots: int | tuple[int, ...], shape: CacheShape) -> tuple[int, ...]:
    """Slots of each MoE layer, at most as many as it has experts."""
    wanted = (slots,) * shape.layers if isinstance(slots, int) else tuple(slots)
    if len(wanted) != shape.layers:
        raise ConfigError(f"{option} has {len(wanted)} values, but the model has {shape.layers} MoE layers.")
    return tuple(map(min, wanted, shape.experts))


def check_slots(slots: object, option: str = "slots_per_layer", least: int = 1) -> None:
    """ConfigError unless these are an int or one per MoE layer. least: the smallest that a single one may be."""
    is_list = isinstance(slots, (list, tuple)) and bool(slots)
    values = slots if isinstance(slots, (list, tuple)) and slots else (slots,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in values):
        raise ConfigError(f"{option}={slots!r} must be an int or one int per MoE layer.")
    if min(values) < (0 if is_list else least):
        raise ConfigError(f"{option}={slots!r} must be a {'positive' if least else 'non-negative'} int.")


def check_forms(forms: Mapping[str, str], exactness: str, activations: str) -> None:
    """ConfigError for forms of weights, exactness and activations that contradict each other.

    forms: "native", "int8" or "int4" of "experts" and of "dense".
    """
    for name, form in forms.items():
        if form != "native" and exactness == "bitwise":
            raise ConfigError(
                f"exactness='bitwise' with {name}={form!r}: quantized, the model has other weights than the "
                "checkpoint's, so no result could be equal to stock's. Leave exactness out, or use "
                f"{name}='native' (what 'offmoe pack' wrote is native to its folder)."
            )
    if activations == "int8" and forms["experts"] == "native" and exactness == "bitwise":
        raise ConfigError(
            "activations='int8' rounds the inputs of experts, which is not bitwise: use exactness='numeric' with "
            "it, or experts='int4' or 'int8'."
        )

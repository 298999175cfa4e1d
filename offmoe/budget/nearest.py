"""The way nearest to what was asked for, where nothing of that fits: as few options as possible change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from offmoe.budget.choices import Choice, CostsOf, in_default_context
from offmoe.budget.inspect import Survey
from offmoe.config import OffloadConfig
from offmoe.text import size_option

GIVEN_UP = (("max_context",), ("prefill_chunk",), ("slots_per_layer", "scope"), ("host_memory",))
"""Options that ask for memory, in the order in which each is given up."""


def nearest(survey: Survey, asked: OffloadConfig, costs_of: CostsOf | None) -> Choice | None:
    """The nearest way that fits; None if the machine has no memory for any.

    What gives way, the nearest first: the length of a context that nobody asked for; one of the options `GIVEN_UP`; all
    of them; the limit of device_memory, if more is free. Of ways that are as near, the one that does not change results
    wins, then the fastest.

    Args:
        survey: the model and the device.
        asked: the options as they were given, no way of which fits.
        costs_of: the costs of each form; None: no speed is predicted.
    """
    given = [tuple(name for name in names if name in asked.explicit) for names in GIVEN_UP]
    steps = list(dict.fromkeys([(), *given, tuple(name for names in given for name in names)]))

    def first(way_of: Callable[[OffloadConfig], Choice | None]) -> Choice | None:
        for names in steps:
            config = OffloadConfig(**{name: getattr(asked, name) for name in asked.explicit.difference(names)})
            way = way_of(config)
            if way is not None:
                return replace(way, dropped=names)
        return None

    found = first(lambda config: _best(in_default_context(survey, config, costs_of)))
    if found is None and "device_memory" in asked.explicit:
        found = first(lambda config: _with_more_memory(survey, config, costs_of))
    return found


def _best(ways: list[Choice]) -> Choice | None:
    """The best way that fits, one with unchanged results before all others."""
    fits = [way for way in ways if way.fits]
    return next((way for way in fits if way.unchanged), fits[0] if fits else None)


def _with_more_memory(survey: Survey, config: OffloadConfig, costs_of: CostsOf | None) -> Choice | None:
    """The way that needs the least device_memory, one with unchanged results before all others, if so much is free."""
    needing = [way for way in in_default_context(survey, config, None) if way.plan.smallest <= survey.free]
    if not needing:
        return None
    size = size_option(min(needing, key=lambda way: (not way.unchanged, way.plan.smallest)).plan.smallest)
    way = _best(in_default_context(survey, config.overridden(device_memory=size), costs_of))
    return None if way is None else replace(way, options=way.options | {"device_memory": size})

"""How scripts sum up what their rounds gave."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median and range. digits: behind the point."""
    middle, low, high = (round(value, digits) for value in (statistics.median(values), min(values), max(values)))
    return {"median": middle, "range": [low, high]}

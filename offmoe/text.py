"""Numbers as people read them: sizes, shares and ranges."""

from __future__ import annotations


def format_size(size: float) -> str:
    """'1.5 GiB' of bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def percent(share: float) -> str:
    """'61.6 %' of 0.616."""
    return f"{100 * share:.1f} %"


def span(values: tuple[int, ...]) -> str:
    """'8' of equal values, '2-8' of others."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def plain(values: tuple[int, ...]) -> int | list[int]:
    """One int where all layers agree, else one per layer: the form of JSON output and of traces."""
    return values[0] if len(set(values)) == 1 else list(values)

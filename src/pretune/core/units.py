"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`42s`, `4m12s`, `2h03m`, `3d04h`: the two largest units."""
    whole = round(max(0.0, seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{smaller}"
    return f"{whole}s"


def short(count: float) -> str:
    """Three digits: `950`, `12.3k`, `4.18M`, `1.31B`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def memory(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"

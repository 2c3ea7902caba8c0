"""Numbers as a report says them."""

from __future__ import annotations

from datetime import UTC, datetime


def count(value: float) -> str:
    return f"{value:,.0f}"


def compact(value: float) -> str:
    """1234567 → 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Two leading units: 3 h 12 min."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def share(value: float) -> str:
    """0.1234 → 12.3%; small shares with more digits."""
    return f"{100 * value:.1f}%" if value >= 0.01 or value == 0 else f"{100 * value:.2g}%"


def moment(unix: float) -> str:
    """A time in UTC."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")

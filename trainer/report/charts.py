"""Line charts as HTML with inline SVG: the lines stretch to any width, the numbers keep their size, and the colours are
the page's, light or dark. page.js.j2 shows the values under the pointer; without it a chart is complete too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_POINTS = 600
SIZE = 1000  # of the SVG's own coordinates, both ways
COLOURS = 8  # classes c0, c1, … of style.css.j2
FEW_POINTS = 30  # so few are also drawn as dots
PARTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """One curve; None and NaN are gaps. `smooth`: draw a moving average over the noisy values."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    smooth: bool = False


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    x_name: str = "step",
    from_zero: bool = False,
    log: bool = False,
    marks: Sequence[float] = (),
    mark_label: str = "",
    wide: bool = False,
) -> str:
    """A `<figure>` with the curves over a common x axis, or "" if no line has a finite value.

    Long lines are averaged into at most MAX_POINTS points.

    Args:
        from_zero: the y axis begins at 0.
        log: the y axis is logarithmic; values of 0 and below are gaps.
        marks: places on the x axis marked at the bottom, explained by `mark_label`.
    """
    drawn = []
    for place, line in enumerate(lines):
        if not line.x:
            continue
        x, y = _averaged(np.array(line.x, float), np.array(line.y, float))  # None becomes NaN
        if log:
            y = np.log10(np.where(y > 0, y, np.nan))
        if np.isfinite(y).any():
            drawn.append(_Drawn(line.name, f"c{place % COLOURS}", x, y, _moving_average(y) if line.smooth else None))
    if not drawn:
        return ""
    frame = _frame(drawn, from_zero=from_zero)
    paths = "".join(_paths(each, frame) for each in drawn)
    legend = "".join(_named(each, log=log) for each in drawn)
    if len(marks):
        places = "".join(f"M{x} 975v25" for x in sorted({round(x) for x in frame.across(np.array(marks, float))}))
        paths += f'<path class="mark" d="{places}"/>'
        legend += f'<span class="mark">{escape(mark_label)}</span>'
    x_ticks, y_ticks = ticks(frame.left, frame.right, 6 if wide else 4), ticks(frame.bottom, frame.top, 4)
    y_texts = [(tick, f"{10**tick:.2g}") for tick in y_ticks] if log else _texts(y_ticks)
    heights = dict(zip(y_ticks, frame.up(np.array(y_ticks)).tolist(), strict=True))
    widths = dict(zip(x_ticks, frame.across(np.array(x_ticks)).tolist(), strict=True))
    grid = "".join(f"M0 {height:.1f}h{SIZE}" for height in heights.values())
    spoken = escape(f"{title} over {x_name}s")
    return "".join(
        (
            f'<figure class="chart{" wide" if wide else ""}">',
            f"<figcaption>{escape(title)} <span>{escape(unit)}</span></figcaption>",
            f'<div class="plot" data-range="{frame}" data-x="{escape(x_name)}"{" data-log" if log else ""}>',
            f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{spoken}">',
            f'<path class="grid" d="{grid}"/>{paths}</svg>',
            *(_label("y", "top", heights[value], text) for value, text in y_texts),
            *(_label("x", "left", widths[value], text) for value, text in _texts(x_ticks)),
            f'</div><div class="legend">{legend}<em>{escape(x_name)}s</em></div></figure>',
        )
    )


class _Drawn(NamedTuple):
    name: str
    colour: str
    x: Array
    y: Array
    trend: Array | None

    @property
    def shown(self) -> Array:
        return self.y if self.trend is None else self.trend


class _Frame(NamedTuple):
    """Limits of the axes."""

    left: float
    right: float
    bottom: float
    top: float

    def __str__(self) -> str:
        return " ".join(f"{limit:.9g}" for limit in self)

    def across(self, x: Array) -> Array:
        return (x - self.left) / (self.right - self.left) * SIZE

    def up(self, y: Array) -> Array:
        return (self.top - y) / (self.top - self.bottom) * SIZE


def _frame(drawn: Sequence[_Drawn], *, from_zero: bool) -> _Frame:
    left, right = min(float(each.x[0]) for each in drawn), max(float(each.x[-1]) for each in drawn)
    left, right = (left, right) if right > left else (left - 1, right + 1)
    return _Frame(left, right, *_limits([each.y for each in drawn], from_zero=from_zero))


def _paths(line: _Drawn, frame: _Frame) -> str:
    """The line; under a moving average, also the values themselves."""
    across = frame.across(line.x)
    raw = "" if line.trend is None else f'<path class="raw {line.colour}" d="{_path(across, frame.up(line.y))}"/>'
    height = frame.up(line.shown)
    dots = f'<path class="dot {line.colour}" d="{_dots(across, height)}"/>' if len(line.x) <= FEW_POINTS else ""
    path = _path(across, height)
    return f'{raw}<path class="line {line.colour}" data-name="{escape(line.name)}" d="{path}"/>{dots}'


def _named(line: _Drawn, *, log: bool) -> str:
    """An entry of the legend, with the line's last value."""
    last = float(line.shown[np.isfinite(line.shown)][-1])
    return f'<span class="{line.colour}">{escape(line.name)} <b>{number(10**last if log else last)}</b></span>'


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers in [low, high], about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.6 * rough)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [count * step for count in range(first, last + 1)]


def number(value: float) -> str:
    """A number of a curve with about four digits, as people say it: 12.3k, 3.142, 2e-05."""
    for size, letter in PARTS:
        if abs(value) >= size and abs(value) >= 1e4:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _texts(values: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with their texts: the same unit and number of decimals for all."""
    largest = max((abs(value) for value in values), default=0.0)
    size, letter = next((part for part in PARTS if largest >= part[0] and largest >= 1e4), (1.0, ""))
    if 0 < largest < 1e-3:
        return [(value, f"{value:.1e}" if value else "0") for value in values]
    gap = (values[1] - values[0]) / size if len(values) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [(value, f"{value / size:.{decimals}f}{letter if value else ''}") for value in values]


def _label(axis: str, side: str, place: float, text: str) -> str:
    """A text beside an axis, `place` in the SVG's coordinates; it does not reach beyond the ends of the x axis."""
    edge = " first" if axis == "x" and place < 30 else " last" if axis == "x" and place > SIZE - 30 else ""
    return f'<i class="{axis}{edge}" style="{side}:{100 * place / SIZE:.2f}%">{text}</i>'


def _path(across: Array, up: Array) -> str:
    """Commands that begin anew after each gap."""
    parts, pen = [], "M"
    for x, y in zip(across.tolist(), up.tolist(), strict=True):
        if math.isfinite(y):
            parts.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _dots(across: Array, up: Array) -> str:
    points = zip(across.tolist(), up.tolist(), strict=True)
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points if math.isfinite(y))


def _averaged(x: Array, y: Array) -> tuple[Array, Array]:
    """Means of equal runs of points, at most MAX_POINTS of them; a run that has only gaps is a gap."""
    size = -(-len(x) // MAX_POINTS)
    if size <= 1:
        return x, y
    starts = np.arange(0, len(x), size)
    present = np.isfinite(y)
    counts = np.add.reduceat(present.astype(float), starts)
    sums = np.add.reduceat(np.where(present, y, 0.0), starts)
    with np.errstate(invalid="ignore"):
        return x[starts], np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _moving_average(y: Array) -> Array | None:
    """Centred mean over 1.5% of the points, five at least; None for too few of them."""
    half = max(len(y) // 132, 2)
    if len(y) < 20 or not np.isfinite(y).any():
        return None
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, half, constant_values=np.nan), 2 * half + 1)
    present = np.isfinite(windows)
    counts = present.sum(1)
    sums = np.where(present, windows, 0.0).sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _limits(values: Sequence[Array], *, from_zero: bool) -> tuple[float, float]:
    """Limits of the y axis, which cut a few outliers rather than flatten everything else."""
    low, high = math.inf, -math.inf
    for y in values:
        finite = y[np.isfinite(y)]
        most = float(finite.max())
        if len(finite) >= 20:
            least, usual = (float(value) for value in np.quantile(finite, [0.0, 0.99]))
            if most > least + 3 * (usual - least) > least:
                most = least + 1.2 * (usual - least)
        low, high = min(low, float(finite.min())), max(high, most)
    if from_zero:
        low = min(low, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-30):
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    edge = 0.06 * (high - low)
    return (low if from_zero and low == 0 else low - edge), high + edge

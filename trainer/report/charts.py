"""Line charts of a run as inline SVG, in the page's font and colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

INK, MUTED, GRID, LINE, MARK = "#1f2733", "#5b6675", "#e3e7ec", "#2f6fb2", "#c2410c"
MAX_POINTS = 600
SETTINGS = {"svg.fonttype": "none", "font.size": 10, "axes.unicode_minus": False}


def line_chart(
    steps: Sequence[int],
    values: Sequence[float | None],
    *,
    title: str,
    name: str,
    wide: bool = False,
    smooth: bool = True,
    marks: Sequence[int] = (),
    mark_label: str = "",
) -> str:
    """Values over steps as an `<svg>` element.

    Long runs are averaged into at most MAX_POINTS points. Missing values are gaps.

    Args:
        title: for screen readers; the page says it too, with the unit, so that the picture needs no second axis label.
        name: unique in the page; ids inside the SVG are made from it.
        smooth: draw a moving average over noisy values.
        marks: steps to be marked below the line, explained by `mark_label`.
    """
    x, y = _averaged(np.array(steps, float), np.array([np.nan if v is None else v for v in values], float))
    trend = _moving_average(y) if smooth else None
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(9.2, 3.3) if wide else (5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        if trend is None:
            axes.plot(x, y, color=LINE, linewidth=1.8)
        else:
            axes.plot(x, y, color=LINE, linewidth=1, alpha=0.3)
            axes.plot(x, trend, color=LINE, linewidth=1.8)
        _limit(axes, y)
        if len(marks):
            bottom = np.full(len(marks), 0.03)
            where = axes.get_xaxis_transform()
            axes.plot(marks, bottom, "|", color=MARK, markersize=5, transform=where, label=mark_label)
            axes.legend(frameon=False, loc="upper right", fontsize=9, labelcolor=MUTED, handletextpad=0)
        axes.set_xlabel("step", color=MUTED)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, length=0)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if wide else 5, integer=True))
        largest = np.nanmax(np.abs(y), initial=0)
        if largest >= 1e4:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        elif largest < 0.1:
            axes.yaxis.set_major_formatter("{x:g}")
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), f"{title} over steps")


def _averaged(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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


def _moving_average(y: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Centred mean over 1.5% of the points, five at least; None for too few of them."""
    half = max(len(y) // 132, 2)
    if len(y) < 20 or not np.isfinite(y).any():
        return None
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, half, constant_values=np.nan), 2 * half + 1)
    present = np.isfinite(windows)
    counts = present.sum(1)
    sums = np.where(present, windows, 0.0).sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _limit(axes: matplotlib.axes.Axes, y: NDArray[np.float64]) -> None:
    """Axis limits that cut a few outliers rather than flatten everything else."""
    finite = y[np.isfinite(y)]
    if len(finite) < 20:
        return
    low, high = np.quantile(finite, [0.0, 0.99])
    if finite.max() > low + 3 * (high - low) > low:
        axes.set_ylim(low - 0.05 * (high - low), low + 1.2 * (high - low))


def _inline(svg: str, description: str) -> str:
    """The bare element: no XML prologue, no fixed size, only used ids, and a description for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)

"""Draw a dashboard with matplotlib, from its JSON and a Prometheus: grid, titles, units, limits and annotations."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from manifests.dashboards.query import Series, View, dashboards, event_queries, series, substituted, targets

GRID_COLUMNS, COLUMN_INCHES, ROW_INCHES = 24, 0.75, 0.36
BACKGROUND, PANEL, INK, FAINT = "#111217", "#181b1f", "#d8d9da", "#5a5d63"
COLORS = {"green": "#37872d", "orange": "#e0762f", "red": "#c4162a", "blue": "#5794f2", "text": INK}
CURVES = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#b877d9", "#5794f2", "#fade2a", "#37872d", "#ffa6b0"]
NO_DATA = "No data"


def draw(ask: Any, view: View, folder: Path) -> None:
    """Write `folder/<name>.png` of each committed dashboard."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in dashboards().items():
        if name == "serving":  # nothing serves in that run
            continue
        picture = _draw(content, ask, view)
        picture.savefig(folder / f"{name}.png", dpi=80, facecolor=BACKGROUND)
        plt.close(picture)
        print(f"wrote {folder / name}.png")


def _draw(content: Mapping[str, Any], ask: Any, view: View) -> Figure:
    height = 2 + max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in content["panels"])
    size = (GRID_COLUMNS * COLUMN_INCHES, height * ROW_INCHES)
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.prop_cycle": plt.cycler(color=CURVES)})
    figure = plt.figure(figsize=size)
    chosen = "   ".join(f"{name}: {value}" for name, value in view.chosen.items())
    figure.text(0.01, 1 - 1.2 / height, content["title"], fontsize=15, va="center")
    figure.text(0.99, 1 - 1.2 / height, chosen, ha="right", va="center", color=FAINT)
    marks = _marks(content, ask, view)
    for panel in content["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] / GRID_COLUMNS, 1 - (place["y"] + 2) / height
        box = (left, top - place["h"] / height, place["w"] / GRID_COLUMNS, place["h"] / height)
        if panel["type"] == "row":
            figure.text(left + 0.008, box[1] + box[3] / 2, panel["title"], fontsize=11, va="center")
            continue
        found = [one for target in targets(panel) for one in series(ask, target, view) if not one.is_empty]
        _panel(figure, panel, box, found, view, marks)
    return figure


def _panel(
    figure: Figure, panel: Mapping[str, Any], box: Sequence[float], found: list[Series], view: View, marks: list[Any]
) -> None:
    left, bottom, width, tall = box
    gap, gap_y = 0.002, 0.12 * tall / panel["gridPos"]["h"]
    frame = figure.add_axes((left + gap, bottom + gap_y, width - 2 * gap, tall - 2 * gap_y), facecolor=PANEL)
    frame.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    frame.spines[:].set_visible(False)
    title = {"va": "center", "fontweight": "bold"}
    frame.text(0.006 / width, 1 - 0.55 / panel["gridPos"]["h"], panel["title"], **title)
    if not found:
        frame.text(0.5, 0.45, NO_DATA, ha="center", va="center", color=FAINT, fontsize=12)
        return
    if panel["type"] == "table":
        _table(frame, panel, found)
    elif panel["type"] == "stat":
        _stat(frame, panel, found)
    else:
        units, below = panel["gridPos"]["h"], 1.1 + 0.5 * math.ceil(len(found) / _legend_columns(panel))
        size = (width - 2 * gap - 0.048, tall * (units - 1.1 - below) / units)
        inner = (left + gap + 0.04, bottom + tall * below / units, *size)
        _curves(figure.add_axes(inner, facecolor=PANEL), panel, found, view, marks)


def _stat(frame: Axes, panel: Mapping[str, Any], found: list[Series]) -> None:
    defaults, share = panel["fieldConfig"]["defaults"], 1 / len(found)
    steps = defaults["thresholds"]["steps"]
    words = {value: word["text"] for each in defaults.get("mappings", []) for value, word in each["options"].items()}
    for number, one in enumerate(found):
        last = [value for _, value in one.points if math.isfinite(value)][-1]
        if panel["options"]["colorMode"] == "background":
            color = COLORS[[step["color"] for step in steps if step["value"] is None or last >= step["value"]][-1]]
            frame.add_patch(Rectangle((number * share + 0.01, 0.04), share - 0.02, 0.66, color=color))
        text = words.get(f"{last:g}") or shown(last, defaults["unit"], defaults.get("decimals"))
        middle, several = (number + 0.5) * share, len(found) > 1
        size, at = (11, 0.45) if several else (18, 0.36)
        frame.text(middle, at, text, ha="center", va="center", fontsize=size)
        if several:
            name = "\n".join(textwrap.wrap(_short(one), max(round(6 * share * panel["gridPos"]["w"]), 8)))
            frame.text(middle, 0.18, name, ha="center", va="center", fontsize=7)


def _table(frame: Axes, panel: Mapping[str, Any], found: list[Series]) -> None:
    hidden = set(panel["transformations"][0]["options"]["excludeByName"])
    for row, one in enumerate(found[:4]):
        cells = {label: value for label, value in one.labels.items() if label not in hidden}
        for column, (label, value) in enumerate(cells.items()):
            x = 0.01 + column / len(cells)
            if row == 0:
                frame.text(x, 0.66, label, color=CURVES[2], va="center")
            frame.text(x, 0.46 - row * 0.2, textwrap.shorten(value, 22, placeholder="…"), va="center", fontsize=8)


def _curves(axes: Axes, panel: Mapping[str, Any], found: list[Series], view: View, marks: list[Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults.get("custom", {})
    if custom.get("stacking", {}).get("mode") == "normal":
        moments = sorted({at for one in found for at, _ in one.points})
        known = [{at: value for at, value in one.points if math.isfinite(value)} for one in found]
        heights = [[values.get(at, 0.0) for at in moments] for values in known]
        names = [_short(one) for one in found]
        axes.stackplot(moments, heights, labels=names, alpha=0.75, linewidth=0)
    else:
        for one in found:
            marker = "o" if len(one.points) < 3 else None
            times, values = _with_gaps(one.points, 2.5 * view.step)
            axes.plot(times, values, linewidth=1.1, label=_short(one), marker=marker, markersize=3)
    for color, at in marks:
        axes.axvline(at, color=COLORS[color], linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    if custom.get("thresholdsStyle", {}).get("mode") == "dashed":
        _limits(axes, defaults)
    axes.set_ylim(defaults.get("min"), defaults.get("max"))
    axes.set_xlim(view.start, view.end)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, defaults["unit"])))
    low, high = axes.get_ylim()
    if custom.get("scaleDistribution", {}).get("type") == "log" and high < 10 * low:  # less than a decade
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: shown(value, defaults["unit"])))
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(FixedLocator(_full_times(view)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{datetime.fromtimestamp(at):%H:%M}"))
    axes.tick_params(which="both", colors=FAINT, labelsize=8, length=2)
    axes.grid(color="#2c2f34", linewidth=0.6)
    axes.spines[:].set_visible(False)
    columns = min(len(found), _legend_columns(panel))
    where = {"loc": "upper left", "bbox_to_anchor": (-0.05, -0.13), "borderaxespad": 0, "ncols": columns}
    axes.legend(**where, frameon=False, fontsize=8, labelcolor=INK, handlelength=1, columnspacing=1)


def _legend_columns(panel: Mapping[str, Any]) -> int:
    return int(panel["gridPos"]["w"]) // 2


def _limits(axes: Axes, defaults: Mapping[str, Any]) -> None:
    """Dashed lines; a limit far above the curves does not change the range of the axis."""
    low, high = axes.get_ylim()
    for step in defaults["thresholds"]["steps"][1:]:
        axes.axhline(step["value"], color=COLORS[step["color"]], linestyle="--", linewidth=1)
        if step["value"] < 4 * high:
            high = max(high, 1.05 * step["value"])
    axes.set_ylim(low, high)


def _marks(content: Mapping[str, Any], ask: Any, view: View) -> list[tuple[str, float]]:
    """(colour, time) of each event that the dashboard marks; consecutive points are one event."""
    found = []
    for annotation, expression in zip(content["annotations"]["list"], event_queries(content).values(), strict=True):
        query = substituted(expression, view)
        for one in ask("query_range", query=query, start=view.start, end=view.end, step=view.step)["result"]:
            if annotation.get("useValueForTime"):
                times = sorted({float(value) / 1000 for _, value in one["values"]})
            else:
                points = [float(at) for at, _ in one["values"]]
                times = points[:1] + [b for a, b in pairwise(points) if b - a > 1.5 * view.step]
            found += [(annotation["iconColor"], at) for at in times]
    return found


def _with_gaps(points: list[tuple[float, float]], longest: float) -> tuple[list[float], list[float]]:
    times: list[float] = []
    values: list[float] = []
    for at, value in points:
        if times and at - times[-1] > longest:
            times.append(at)
            values.append(math.nan)
        times.append(at)
        values.append(value)
    return times, values


def _full_times(view: View) -> list[float]:
    """At most six ticks, at whole minutes or hours."""
    apart = next(minutes * 60 for minutes in (1, 2, 5, 15, 60, 240, 1440) if view.end - view.start < 360 * minutes)
    first = math.ceil(view.start / apart)
    return [float(number * apart) for number in range(first, int(view.end / apart) + 1)]


def _short(one: Series) -> str:
    """Remove the run from the end of legends; the picture's title names it."""
    return one.name.removesuffix(one.labels.get("run", "")).strip() or one.name


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """A value in one of Grafana's units."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %" if decimals is None else f"{100 * value:.{decimals}f} %"
    if unit == "s":
        for seconds, name in ((3600, "h"), (60, "min")):
            if abs(value) >= 2 * seconds:
                return f"{value / seconds:.3g} {name}"
        return f"{value:.3g} s" if abs(value) >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    if unit == "none":
        return f"{value:.{decimals}f}" if decimals is not None else f"{value:.4g}"
    suffix = {"bytes": "B", "Bps": "B/s", "binBps": "B/s", "short": ""}.get(unit, unit.removeprefix("si:"))
    base, binary = (1024, "i") if unit in ("bytes", "binBps") else (1000, "")
    power = min(4, int(math.log(abs(value), base))) if abs(value) >= 1 else 0
    prefix = f"{'kMGT'[power - 1]}{binary}" if power else ""
    return f"{value / base**power:.3g} {prefix}{suffix}".strip()

"""The queries that Grafana would send to Prometheus for a dashboard: variables replaced, one query per target.

    for target in targets(content): print(target.panel, target.expression)

Reads only the JSON, so that the committed dashboards are tested and drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Ask = Callable[..., Any]
FOLDER = Path(__file__).parents[2] / "charts" / "yaongi" / "files" / "dashboards"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
VARIABLES = ("namespace", "run", "pipeline", "rank", "server")


@dataclass(frozen=True)
class Target:
    """One query of a panel, as in the dashboard."""

    panel: str
    expression: str
    legend: str
    instant: bool


def dashboards() -> dict[str, dict[str, Any]]:
    """The committed dashboards by file name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def panels(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel except rows, including those in collapsed rows."""
    for panel in content["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def targets(panel: Mapping[str, Any]) -> Iterator[Target]:
    for target in panel["targets"]:
        yield Target(panel["title"], target["expr"], target["legendFormat"], target.get("instant", False))


def event_queries(content: Mapping[str, Any]) -> dict[str, str]:
    """Name → expression."""
    return {annotation["name"]: annotation["expr"] for annotation in content["annotations"]["list"]}


@dataclass(frozen=True)
class View:
    """The state of a dashboard page: time range, template variables, and Prometheus' scrape interval.

    Attributes:
        start, end: Unix seconds.
        scrape_interval: seconds, as set in Grafana's data source.
        chosen: value of each template variable, a list for several; a missing variable is All.
        points: maximum number of points of a curve.
    """

    start: float
    end: float
    scrape_interval: float
    chosen: Mapping[str, str | list[str]]
    points: int = 400

    @property
    def step(self) -> float:
        """Seconds between points."""
        return max(self.scrape_interval, math.ceil((self.end - self.start) / self.points))


@dataclass(frozen=True)
class Series:
    """A curve: its labels, name, and points (Unix seconds, value); the value may be NaN, as in Prometheus."""

    labels: dict[str, str]
    name: str
    points: list[tuple[float, float]]

    @property
    def is_empty(self) -> bool:
        return not any(math.isfinite(value) for _, value in self.points)


def series(ask: Ask, target: Target, view: View) -> list[Series]:
    """The curves of `target`.

    Args:
        ask: (path below /api/v1, parameters) → `data` of Prometheus's answer.
    """
    query = substituted(target.expression, view)
    if target.instant:
        found = ask("query", query=query, time=view.end)["result"]
        points = [[item["value"]] for item in found]
    else:
        found = ask("query_range", query=query, start=view.start, end=view.end, step=view.step)["result"]
        points = [item["values"] for item in found]
    return [
        Series(item["metric"], _name(target.legend, item["metric"]), [(float(at), float(value)) for at, value in pairs])
        for item, pairs in zip(found, points, strict=True)
    ]


def _name(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend).strip()


def substituted(expression: str, view: View) -> str:
    """`expression` as Grafana would send it.

    Raises:
        ValueError: the expression names a variable that Grafana would not replace.
    """
    built_in = {
        "__interval": f"{view.step:g}s",
        "__rate_interval": f"{max(view.step + view.scrape_interval, 4 * view.scrape_interval):g}s",
        "__range": f"{math.ceil(view.end - view.start)}s",
    }

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name in built_in:
            return built_in[name]
        if name not in VARIABLES:
            raise ValueError(f"{expression}: nothing replaces ${name}")
        found = view.chosen.get(name, ".*")
        return found if isinstance(found, str) else f"({'|'.join(map(re.escape, found))})"

    return _VARIABLE.sub(value, expression)

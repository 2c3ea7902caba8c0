"""Templates of pages. Each page is one file: style and script are in it, and it loads nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.report.words import compact, count, duration, share


def page(template: str, **values: Any) -> str:
    """The text of a page; values are escaped, but not the figures of `line_chart`."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trainer", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "duration": duration, "compact": compact, "share": share}
    return environment

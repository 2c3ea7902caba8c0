"""Jobs for the tests of the data steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.spec import JobSpec, parse, preset


@pytest.fixture
def make_job() -> Callable[..., JobSpec]:
    """(origins by source name, datasets folder, max_bytes_per_source, text_column) -> a tiny job with equal weights."""

    def make(
        origins: dict[str, dict[str, Any]], folder: Path, max_bytes: int | None = None, text_column: str = "text"
    ) -> JobSpec:
        value = preset("tiny")
        shared = {"domain": "en", "licence": "CC0-1.0", "weight": 1 / len(origins), "text_column": text_column}
        value["data"] = {
            "sources": {name: shared | {"origin": origin} for name, origin in origins.items()},
            "max_bytes_per_source": max_bytes,
        }
        value["storage"] = {"datasets_dir": str(folder)}
        return parse(JobSpec, value)

    return make

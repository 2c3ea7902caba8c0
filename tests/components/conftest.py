"""Jobs for the tests of the data steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from default_sources import repositories
from hub_server import HubServer
from hub_worker import Hub

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


@pytest.fixture(scope="session")
def _hub_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One for all tests: the Hub's address is fixed when its library is imported, and the import takes seconds."""
    with HubServer({}, datasets=repositories()) as server, Hub.started(server, tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(_hub_process: Hub) -> Hub:
    """A Hub without faults and the process that reads from it."""
    _hub_process.server.reset()
    return _hub_process

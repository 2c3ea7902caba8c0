"""The command line, for the tests of several packages."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from order import longest_first
from tools import left_out

Answer = tuple[int, str, str]

# One thread each. Threads that wait for one that a busy machine has put aside spin meanwhile: with two, a test of half
# a minute has taken ten. Set before PyTorch is imported, and inherited.
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until all is imported: what stays to the end is looked through for nothing

if "MARGINS" in os.environ:  # tests/margins.py
    import bounds  # noqa: F401  it watches comparisons

if importlib.util.find_spec("hypothesis"):  # not in the environments of the tests of kernels and peers
    from hypothesis import HealthCheck, settings

    # The same examples everywhere, and no example fails for the time it took: a busy machine is no finding.
    settings.register_profile(
        "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("repeatable")


@pytest.fixture
def yaongi(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Answer]:
    """Runs the command line in an empty folder; gives exit code, stdout and stderr."""
    from pipelines import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YAONGI_VERBOSE", "")  # set, so that what --verbose leaves there is undone too
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["yaongi", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What this machine lacks, last, where a person looks."""
    if line := left_out(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)  # what is deselected is gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)

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

# One thread each. With more, threads spin while they wait for one that a busy machine has suspended: with two, a test
# of half a minute has taken ten minutes. Set before PyTorch is imported, and inherited.
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until all is imported: objects that live to the end need no collection

if "MARGINS" in os.environ:  # tests/margins.py
    import bounds  # noqa: F401  it watches comparisons

if importlib.util.find_spec("hypothesis"):  # not in the environments of the tests of kernels and peers
    from hypothesis import HealthCheck, settings

    # The same examples everywhere, and no example fails because it was slow: a busy machine is not an error.
    settings.register_profile(
        "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("repeatable")


@pytest.fixture
def yaongi(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Answer]:
    """Runs the command line in an empty folder; returns exit code, stdout and stderr."""
    from pipelines import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YAONGI_VERBOSE", "")  # set, so that changes by --verbose are undone too
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
    """Report what this machine lacks at the end, where it is noticed."""
    if line := left_out(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)  # deselected tests are removed
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)

"""Programs other than Python that tests call."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Path of a program, from $NAME, this Python's environment or PATH.

    A test that needs an absent one is skipped with a reason; where CI is set it fails.
    """
    beside = Path(sys.executable).with_name(name)
    found = os.environ.get(name.upper()) or (str(beside) if beside.exists() else shutil.which(name))
    if found:
        return found
    reason = f"{name} is not installed"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI leaves no test out")
    pytest.skip(reason)


def left_out(reports: Iterable[pytest.TestReport]) -> str:
    """One line about tests that were skipped: what was missing, and how many each cost; empty without any."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ").strip().partition("\n")[0]
        for report in reports
        if isinstance(report.longrepr, tuple)
    )
    each = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return (
        f"{reasons.total()} test{'s were' if reasons.total() > 1 else ' was'} left out on this machine: {each}"
        if reasons
        else ""
    )

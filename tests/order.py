"""The order in which files of tests are given to workers."""

from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# The slowest files, the slowest first, so that none of them starts when the others end.
LONGEST = (
    "trainer/test_compile.py",
    "pipelines/test_dashboards_live.py",
    "trainer/test_parallel.py",
    "trainer/test_learning.py",
    "pipelines/test_run.py",
    "trainer/test_resume.py",
    "trainer/test_gang.py",
    "pipelines/test_verbs.py",
    "pipelines/test_dual.py",
    "e2e/test_pipeline.py",
)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort by file: the longest, then those of many tests."""
    size = Counter(item.path for item in items)
    place = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path, len(LONGEST)), -size[item.path]))

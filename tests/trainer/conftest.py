"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import micro
import pytest


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the tokenizer and the shards of the micro model."""
    directory = tmp_path_factory.mktemp("micro-data")
    micro.make_data(directory)
    return directory

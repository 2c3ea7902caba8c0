"""Fixtures of the trainer's tests."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import micro
import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the tokenizer and the shards of the micro model."""
    directory = tmp_path_factory.mktemp("micro-data")
    micro.make_data(directory)
    return directory


@pytest.fixture(scope="session")
def answers_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but only answers of one of the two sources are trained."""
    directory = tmp_path_factory.mktemp("answers-data")
    micro.make_data(directory, answers={"ko": 3})
    return directory


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Random numbers of a test do not depend on earlier tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def remote_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep transformers from copying code that it imports from a model's folder into the home directory."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("remote-code"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", directory)
        patch.syspath_prepend(directory)
        yield


@pytest.fixture
def quiet_checkpoint_library() -> None:
    """It logs every call at DEBUG, which would hide the failure in a failing test's output."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture
def leave_no_traces() -> Iterator[None]:
    """Restore signal handlers, threads and determinism, which training changes; normally it owns its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if dist.is_initialized():
        dist.destroy_process_group()

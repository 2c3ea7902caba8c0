"""What Megatron core 0.12 lacks to write checkpoints here: with a newer PyTorch, and after a stop signal."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
FORMAT = "serialization_format"


def name_the_format() -> None:
    """PyTorch 2.8 made the format of a checkpoint's items an argument without default, which core gives from 0.13 on.

    Without Megatron core there is nothing to do.
    """
    if not _is_there():
        return
    writer: Any = importlib.import_module(WRITER)
    if FORMAT not in inspect.signature(writer._write_item).parameters:
        return
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    # An argument that core gives itself still wins.
    writer._write_item = functools.partial(writer._write_item, **{FORMAT: SerializationFormat.TORCH_SAVE})


@contextmanager
def checkpoints_outlive_signals() -> Iterator[None]:
    """Megatron's checkpoints work after a stop signal to the whole process group, as torchrun sends it.

    Core keeps the results of writers in a queue that a process of its own serves, and a SIGTERM ends that process just
    before the last checkpoint needs it, a synchronous one too. So the process is started here, deaf to the signal, and
    ended with the block.
    """
    if not _is_there():
        yield
        return
    writer: Any = importlib.import_module(WRITER)
    if getattr(writer, "_results_queue", ...) is not None:  # a release that does it otherwise
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is ignored stays so in a new process
    try:
        manager = multiprocessing.get_context("spawn").Manager()
    finally:
        signal.signal(signal.SIGTERM, before)
    writer._results_queue = manager.Queue()
    try:
        yield
    finally:
        manager.shutdown()


def _is_there() -> bool:
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None

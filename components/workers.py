"""A process pool, one process per core, that loses no finished work if one dies and does not outlive its parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """`with Workers(count) as workers:`; processes start once there is work for several, and stay until the end."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def run(self, call: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
        """Yield each item with `call(item)`, in order of completion.

        Raises:
            ChildProcessError: a worker died.
            Exception: raised by `call`; items not yet begun are not processed.
        """
        if self._pool is None and min(self._count, len(items)) <= 1:
            for item in items:
                yield item, call(item)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_start_worker)
        futures = {self._pool.submit(call, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process died; if no line above says why, it was killed, most often because memory ran out: "
                "lower shards.workers or shards.unit_bytes and run again"
            ) from None
        finally:
            for future in futures:
                future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Start a worker for one core: the tokenizer uses no threads, and the worker dies with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

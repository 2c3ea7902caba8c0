"""A pool of processes, one a core, that lose nothing when one dies and do not outlive their parent."""

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
    """`with Workers(count) as workers:`; processes start when there is work for several, and stay until the end."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def run(self, call: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
        """Each item with `call(item)`, in the order of completion.

        Raises:
            ChildProcessError: a worker died.
            Exception: what `call` raises; items not begun by then are left undone.
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
                "a worker process died; when no line above says why, it was killed, most often for want of memory: "
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
    """One process a core: no threads of the tokenizer's own, and no life after the parent's death."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

"""Passes what Megatron-LM prints on to all ranks: only the last one prints the steps, but every rank has a watchdog and
metrics, and rank 0 the files of the run.
"""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self, TextIO

import torch.distributed as dist

from trainer.distributed import World
from trainer.megatron.log import Event, read

PERIOD_SECONDS = 1.0


class Tee(io.TextIOBase):
    """A text stream in place of `stream` that also gives every whole line to `take`."""

    def __init__(self, stream: TextIO, take: Callable[[str], None]) -> None:
        self._stream, self._take, self._begun = stream, take, ""
        self._lock = threading.Lock()  # threads of Megatron print too

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._take(line)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False


class Relay:
    """Once a second, gives every rank the events of the last rank, and each rank its own.

    The broadcast runs in a thread, over the gloo group that only it uses, so that a rank that waits in a collective of
    NCCL still gets what others have printed. It ends when the last rank has closed it, or a peer is gone.

    Args:
        take: called in the thread with each event.
        alive: called in the thread when the last rank has printed anything.
    """

    def __init__(self, world: World, take: Callable[[Event], None], alive: Callable[[], None]) -> None:
        self._world, self._receive, self._alive = world, take, alive
        self._source = world.size - 1
        self._events: deque[Event] = deque()
        self._own: deque[Event] = deque()
        self._printed = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def line(self, text: str) -> None:
        """A line that this rank has printed."""
        if self._world.rank == self._source:
            self._printed = True
        if (event := read(text)) is not None:
            (self._events if self._world.rank == self._source else self._own).append(event)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """After the last line, every rank has got all. A rank that failed does not wait for the last one's end."""
        self._closed.set()
        if error is None or self._world.rank == self._source:
            self._thread.join()

    def _run(self) -> None:
        while True:
            started = time.monotonic()
            ended = self._closed.is_set()  # before the events are taken, so that none is left behind
            box = [(self._taken(self._events), self._printed, ended)]
            self._printed = False
            try:
                dist.broadcast_object_list(box, src=self._source, group=self._world.background)
            except RuntimeError:  # a peer is gone, which the main thread notices by itself
                return
            events, printed, over = box[0]
            if printed:
                self._alive()
            for event in [*events, *self._taken(self._own)]:
                self._receive(event)
            if over:
                return
            if self._world.rank == self._source:  # the others wait in the broadcast
                self._closed.wait(max(0.0, PERIOD_SECONDS - (time.monotonic() - started)))

    @staticmethod
    def _taken(events: deque[Event]) -> list[Event]:
        return [events.popleft() for _ in range(len(events))]

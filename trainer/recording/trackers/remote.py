"""The trainer's side of the trackers: hands messages to their process (sender.py) and never waits for it.

A bounded queue and a thread lie between the training and the pipe. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from trainer.recording.trackers.base import EventName, Tracker
from trainer.recording.trackers.keys import wanted
from trainer.recording.trackers.sender import LOCK_SECONDS, MOST_SECONDS
from trainer.spec import TrainSpec

MOST_WAITING = 10_000
KILL_SECONDS = LOCK_SECONDS + MOST_SECONDS + 3.0  # it ends by itself before

log = logging.getLogger(__name__)


class Remote(Tracker):
    """All trackers of the spec, in a process of their own.

    Args:
        trains: whether this is a training, whose end must be told, or a word about one.
    """

    def __init__(self, spec: TrainSpec, *, trains: bool) -> None:
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        self._ended = not trains
        self._process: subprocess.Popen[str] | None = None
        self._reaping, self._reaped = threading.Lock(), False
        first = {"spec": spec.model_dump(mode="json"), "trains": trains, "time": time.time()}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.recording.trackers.sender"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # it ends with its input, not by a Ctrl-C in the terminal
            )
        except OSError as error:
            log.warning("trackers: their process cannot be started (%s); the run goes on without them", error.strerror)
            return
        self._waiting.put(first)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def add(self, step: int, values: dict[str, float]) -> None:
        self._put({"do": "add", "step": step, "values": dict(values)})

    def event(self, name: EventName, values: dict[str, Any]) -> None:
        self._ended = self._ended or name in ("end", "error")
        self._put({"do": "event", "name": name, "values": values})

    def summary(self, values: dict[str, Any]) -> None:
        self._put({"do": "summary", "values": values})

    @property
    def ended(self) -> bool:
        """Whether the training's end has been told."""
        return self._ended

    def flush(self) -> None:
        """The process sends by itself."""

    def close(self) -> None:
        """Wait until all is sent, at most KILL_SECONDS."""
        if self._process is None:
            return
        with suppress(queue.Full):
            self._waiting.put(None, timeout=1.0)
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("trackers: their process does not end; their last numbers are not sent")
        self._reap()
        for thread in self._threads:
            thread.join(1.0)
        if self._dropped:
            log.warning("trackers: %d messages were dropped, as their process was too slow", self._dropped)
        self._process = None

    def _put(self, message: dict[str, Any]) -> None:
        if self._process is None:
            return
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        process = self._process
        assert process is not None and process.stdin is not None
        message: dict[str, Any] | None = None
        try:
            while (message := self._waiting.get()) is not None:
                process.stdin.write(json.dumps(message, default=str) + "\n")
                if self._waiting.empty():
                    process.stdin.flush()
            process.stdin.close()
        except OSError:  # it died
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            self._reap()
            while message is not None:  # nobody must wait for a place in the queue
                message = self._waiting.get()

    def _reap(self) -> None:
        """End the process and those of the clients, once: later its number may be another's."""
        process = self._process
        with self._reaping:
            if process is None or self._reaped:
                return
            self._reaped = True
            code = process.poll()  # None: it must be ended
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if code:
                log.warning("trackers: their process ended (%d); the run goes on without them", code)

    def _read(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError, KeyError):
                said = json.loads(line)
                log.log(logging.WARNING if said["level"] == "warning" else logging.INFO, "%s", said["text"])


def tell(spec: TrainSpec, events: dict[EventName, dict[str, Any]], summary: dict[str, Any] | None = None) -> None:
    """Say a word about a run whose training is not in this process, if it has trackers."""
    if wanted(spec) is None:
        return
    remote = Remote(spec, trains=False)
    if summary:
        remote.summary(summary)
    for name, values in events.items():
        remote.event(name, values)
    remote.close()

"""The process that talks to the trackers, so that nothing that their clients do can touch the training.

    python -m trainer.recording.trackers.sender

It reads messages of `remote` from its standard input, a line of JSON each, the first with the spec, and writes lines
{"level", "text"} for the log to its standard output. Each tracker has a thread with a bounded queue; one that is down
gets its messages later, the oldest numbers are dropped. After the input's end they get some seconds. No torch.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trainer.recording.trackers import state
from trainer.recording.trackers.base import Refused
from trainer.recording.trackers.keys import TITLES, in_short, not_installed, wanted
from trainer.recording.trackers.state import Place
from trainer.spec import TrainSpec
from trainer.trackerspec import TrackerName

CLOSE_SECONDS = 10.0  # at the end, for a tracker whose client has been imported and that makes no progress
MOST_SECONDS = 30.0  # at the end, for one that does
FLUSH_SECONDS = 2.0
RETRY_SECONDS = 30.0
MOST_WAITING = 20_000
LOCK, LOCK_SECONDS = ".trackers.lock", 15.0
# Before a client is imported: short timeouts, and no reports of their own.
SETTINGS = {
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
Tell = Callable[[str, str], None]


class Desk(threading.Thread):
    """The thread of one tracker."""

    def __init__(self, name: TrackerName, make: Callable[[], Any], opened: Callable[[Place], None], tell: Tell) -> None:
        super().__init__(name=name, daemon=True)
        self._title, self.tracker, self._make, self._opened, self._tell = TITLES[name], name, make, opened, tell
        self._waiting: deque[dict[str, Any]] = deque()
        self._something = threading.Condition()
        self._client: Any = None
        self._closing = self._warned = self._imported = False
        self._progress = time.monotonic()

    def put(self, message: dict[str, Any]) -> None:
        """Queue a message; of too many, the oldest numbers of a step go."""
        with self._something:
            if len(self._waiting) >= MOST_WAITING:
                numbers = next((each for each in self._waiting if each["do"] == "add"), self._waiting[0])
                self._waiting.remove(numbers)
            self._waiting.append(message)
            self._something.notify()

    def finish(self) -> None:
        """Send what waits and end; without a second try."""
        with self._something:
            self._closing, self._progress = True, time.monotonic()
            self._something.notify()

    def stands_still(self) -> bool:
        """Whether its server has taken nothing for CLOSE_SECONDS."""
        return self._imported and time.monotonic() > self._progress + CLOSE_SECONDS

    def warn(self, line: str) -> None:
        """Only once for a tracker: a run must not be buried in lines about it."""
        if not self._warned:
            self._tell("warning", line)
        self._warned = True

    def run(self) -> None:
        try:
            last = False
            while not self._attempt() and not last:
                with self._something:
                    last = self._closing or self._something.wait_for(lambda: self._closing, RETRY_SECONDS)
        except Refused as error:
            self.warn(str(error))
        except ImportError:
            self.warn(not_installed(self.tracker))

    def _attempt(self) -> bool:
        """Work until the end; False if something failed that may be better later."""
        try:
            if self._client is None:
                try:
                    importlib.import_module(self.tracker)
                finally:
                    self._progress = time.monotonic()
                    self._imported = True  # thousands of files; from now on it is its server that is waited for
                self._client = self._make()
                self._progress = time.monotonic()
                self._opened(self._client.place)
                if self._client.remark:
                    self.warn(self._client.remark)
            while True:
                with self._something:
                    self._something.wait_for(lambda: self._waiting or self._closing, FLUSH_SECONDS)
                    message = self._waiting[0] if self._waiting else None
                    closing = self._closing
                if message is not None:
                    self._hand_over(message)
                    self._progress = time.monotonic()
                    with self._something, suppress(ValueError):  # dropped meanwhile, as too many wait
                        self._waiting.remove(message)
                elif closing:
                    self._client.close()
                    return True
                else:
                    self._client.flush()
        except (Refused, ImportError):
            raise
        except Exception as error:  # anything that a client may do
            self.warn(f"{self._title}: {in_short(error)}; the run goes on, and it is tried again")
            return False

    def _hand_over(self, message: dict[str, Any]) -> None:
        if message["do"] == "add":
            self._client.add(message["step"], message["values"])
        elif message["do"] == "event":
            self._client.event(message["name"], message["values"])
        elif message["do"] == "summary":
            self._client.summary(message["values"])


def makers(spec: TrainSpec, known: dict[str, Place]) -> dict[TrackerName, Callable[[], Any]]:
    """How to open each tracker of the spec; a client is imported when it is opened."""
    trackers = wanted(spec)
    found: dict[TrackerName, Callable[[], Any]] = {}
    if trackers is None:
        return found

    if (ours := trackers.wandb) is not None:

        def open_wandb(ours: Any = ours) -> Any:
            from trainer.recording.trackers.wandb import Wandb

            return Wandb(spec, ours, known.get("wandb"))

        found["wandb"] = open_wandb
    if (theirs := trackers.mlflow) is not None:

        def open_mlflow(theirs: Any = theirs) -> Any:
            from trainer.recording.trackers.mlflow import Mlflow

            return Mlflow(spec, theirs, known.get("mlflow"))

        found["mlflow"] = open_mlflow
    if (events := trackers.langfuse) is not None:

        def open_langfuse(events: Any = events) -> Any:
            from trainer.recording.trackers.langfuse import Langfuse

            return Langfuse(spec, events, known.get("langfuse"))

        found["langfuse"] = open_langfuse
    return found


def leave(desks: list[Desk]) -> list[Desk]:
    """Wait for desks that were told to finish; returns those that had no progress for CLOSE_SECONDS, or are not done
    after MOST_SECONDS."""
    end = time.monotonic() + MOST_SECONDS
    for desk in desks:
        while desk.is_alive() and time.monotonic() < end and not desk.stands_still():
            desk.join(0.05)
    return [desk for desk in desks if desk.is_alive()]


class Session:
    """The trackers of one run, from the first message to the last."""

    def __init__(self, first: dict[str, Any], tell: Tell) -> None:
        self._spec, self._tell = TrainSpec.model_validate(first["spec"]), tell
        self._writing = threading.Lock()
        self._state = state.read(self._spec.run_dir)
        if first["trains"]:
            self._state.started, self._state.host, self._state.told = first["time"], socket.gethostname(), False
            self._write()
        self._desks = [
            Desk(name, make, lambda place, name=name: self._opened(name, place), tell)  # type: ignore[misc]  # its default
            for name, make in makers(self._spec, dict(self._state.places)).items()
        ]
        for desk in self._desks:
            desk.start()

    def take(self, message: dict[str, Any]) -> None:
        if message["do"] == "event" and message["name"] in ("end", "error"):
            self._state.told = True
            self._write()
        for desk in self._desks:
            desk.put(message)

    def close(self) -> None:
        """Let every tracker send what waits, and leave those that stand still."""
        for desk in self._desks:
            desk.finish()
        for desk in leave(self._desks):
            desk.warn(f"{TITLES[desk.tracker]}: too slow; its last numbers are not sent")

    def _opened(self, name: str, place: Place) -> None:
        if self._state.places.get(name) != place:
            self._state.places[name] = place
            self._write()
        if place.url:
            self._tell("info", f"{TITLES[name]}: {place.url}")  # type: ignore[index]  # a TrackerName

    def _write(self) -> None:
        with self._writing:
            try:
                self._state.write(self._spec.run_dir)
            except OSError as error:
                self._tell("warning", f"{state.FILE} cannot be written ({error.strerror})")


def alone(run_dir: str, seconds: float) -> IO[str] | None:
    """Wait until the process of an earlier start has sent its last; the open file is the lock. None: not in time."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    file = (Path(run_dir) / LOCK).open("w")
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > end:
                return None
            time.sleep(0.1)


def end_after(parent: int) -> None:
    """A process that the training has forked may hold its end of the pipe open after the training's death."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(MOST_SECONDS)
    os._exit(0)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with its input
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(10)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w") as nothing:  # what clients print is for people at a terminal
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    logging.lastResort = None
    writing = threading.Lock()

    def tell(level: str, text: str) -> None:
        with writing, suppress(OSError, ValueError):  # nobody reads it any more
            print(json.dumps({"level": level, "text": text}), file=out, flush=True)

    os.environ |= {name: value for name, value in SETTINGS.items() if name not in os.environ}
    first = json.loads(sys.stdin.readline())
    lock = alone(first["spec"]["run_dir"], LOCK_SECONDS)
    threading.Thread(target=end_after, args=(os.getppid(),), daemon=True).start()
    session = Session(first, tell)
    for line in sys.stdin:
        session.take(json.loads(line))
    session.close()
    if lock is not None:
        lock.close()
    return 0


if __name__ == "__main__":
    main()
    os._exit(0)  # a client's thread or exit handler may hang

"""Watch threads of the launcher: one for each kind of object, one for the log of worker 0.

They survive API outages: they resume from the last resource version or line, and list again if that is too old.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from kubernetes.client.exceptions import ApiException
from kubernetes.watch import Watch

from components.cluster import state
from components.cluster.api import Cluster, Unreachable
from manifests.kinds import Object

# A dead connection goes unnoticed, so watches are short: the server ends them and the next one resumes.
WATCH_SECONDS = 40
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
# A new log request starts this long before the last line arrived: lines are delayed and the API takes whole seconds.
OVERLAP_SECONDS = WATCH_SECONDS + 10
LINES_KEPT = 2000


@dataclass(frozen=True)
class Change:
    """`objects`: all objects for type LISTED, else the one object that was ADDED, MODIFIED or DELETED."""

    kind: str
    type: str
    objects: list[Object]


class Watcher(threading.Thread):
    """Puts every change of one kind of object into `changes`, and a LaunchError if the API server forbids watching.

    Args:
        list_call: a list method of the kubernetes client, bound to its namespace and selectors.
    """

    def __init__(self, cluster: Cluster, kind: str, list_call: Callable[..., Any], changes: queue.Queue[Any]) -> None:
        super().__init__(name=f"watch-{kind}", daemon=True)
        self.unreachable_since: float | None = None  # monotonic seconds; None while the API server answers
        self._cluster, self._kind, self._list, self._changes = cluster, kind, list_call, changes
        self._version: str | None = None
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        pause, renewed = FIRST_PAUSE_SECONDS, False
        while not self._stopped.is_set():
            try:
                if self._version is None:
                    self._list_all()
                else:
                    self._follow()
                self.unreachable_since = None
                pause, renewed = FIRST_PAUSE_SECONDS, False
            except ApiException as error:
                if error.status == HTTPStatus.GONE:
                    self._version = None
                    continue
                expired = error.status == HTTPStatus.UNAUTHORIZED
                if error.status in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND) or (expired and renewed):
                    verb = "list" if self._version is None else "watch"
                    self._changes.put(self._cluster.refusal(f"{verb} {self._kind}", error))
                    return
                if expired:
                    self._cluster.renew()
                    renewed = True
                pause = self._wait(pause)
            except Unreachable:
                pause = self._wait(pause)
            except (ValueError, KeyError, TypeError):  # not from an API server, perhaps from a proxy; start over
                self._version = None
                pause = self._wait(pause)

    def _wait(self, pause: float) -> float:
        if self.unreachable_since is None:
            self.unreachable_since = time.monotonic()
        self._stopped.wait(pause)
        return min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _list_all(self) -> None:
        response = self._list(_preload_content=False, _request_timeout=(5, 30))
        listing = json.loads(response.data)
        self._version = listing["metadata"]["resourceVersion"]
        self._changes.put(Change(self._kind, "LISTED", listing["items"]))

    def _follow(self) -> None:
        stream = Watch(return_type="object").stream(
            self._list,
            resource_version=self._version,
            timeout_seconds=WATCH_SECONDS,
            _request_timeout=(5, WATCH_SECONDS + 10),
        )
        for event in stream:
            found = event["raw_object"]
            self._version = found["metadata"]["resourceVersion"]
            self._changes.put(Change(self._kind, event["type"], [found]))
            if self._stopped.is_set():
                return


class _Printed:
    """Remembers printed log lines, to tell repeated lines of a new connection from new ones.

    Timestamps alone are not enough: some container runtimes stamp all lines of a buffer at once, and stdout and stderr
    arrive out of order. So the latest lines are kept, each with its timestamp.
    """

    def __init__(self) -> None:
        self.newest = ""  # stamp; stamps sort as text
        self._latest: deque[str] = deque()
        self._floor = ""  # no line up to this time is kept
        self._repeated: Counter[str] | None = None

    def reconnected(self) -> None:
        """The next lines may be repetitions, until one is newer than all before."""
        self._repeated = Counter(self._latest) if self.newest else None

    def is_new(self, line: str) -> bool:
        stamp = line.partition(" ")[0]
        if self._repeated is not None:
            if stamp > self.newest:
                self._repeated = None
            elif self._repeated[line] or stamp <= self._floor:
                self._repeated[line] -= 1
                return False
        self._latest.append(line)
        if len(self._latest) > LINES_KEPT:
            self._floor = max(self._floor, self._latest.popleft().partition(" ")[0])
        self.newest = max(self.newest, stamp)
        return True


class LogFollower(threading.Thread):
    """Prints the logs of pods one after another, each line once; a restarted worker is a new pod."""

    def __init__(self, cluster: Cluster, write: Callable[[str], None]) -> None:
        super().__init__(name="follow-log", daemon=True)
        self._cluster, self._write = cluster, write
        self._pods: queue.Queue[tuple[str, str, str] | None] = queue.Queue()
        self._seen: set[str] = set()
        self._ended: set[str] = set()
        self._stopped = threading.Event()

    def add(self, pod: Object) -> None:
        """Follow a pod whose container has started; a second call for the same pod changes nothing."""
        uid = pod["metadata"]["uid"]
        if uid not in self._seen:
            self._seen.add(uid)
            self._pods.put((pod["metadata"]["name"], uid, state.container(pod)["name"]))

    def ended(self, uid: str) -> None:
        """The pod will write no more."""
        self._ended.add(uid)

    def finish(self, seconds: float) -> None:
        """Print what has been written so far, for at most `seconds`, and stop."""
        self._ended |= self._seen
        self._pods.put(None)
        self.join(seconds)
        self._stopped.set()

    def run(self) -> None:
        while (entry := self._pods.get()) is not None:
            self._follow(*entry)

    def _follow(self, name: str, uid: str, container: str) -> None:
        printed = _Printed()
        since = time.monotonic()
        whole = True  # request the log from its beginning
        pause, renewed = FIRST_PAUSE_SECONDS, False
        while not self._stopped.is_set():
            ended = uid in self._ended
            doing = "get pods"
            try:
                if self._cluster.core.read_namespaced_pod(name, self._cluster.namespace).metadata.uid != uid:
                    return
                doing = "get pods/log"
                printed.reconnected()
                asked_since = {} if whole else {"since_seconds": int(time.monotonic() - since) + OVERLAP_SECONDS}
                first, whole = True, not printed.newest
                for line in self._lines(name, container, ended, **asked_since):
                    if first and asked_since and line.partition(" ")[0] > printed.newest:
                        whole, ended, pause = True, False, 0  # does not reach back to the last line: request more
                        break
                    first, renewed = False, False
                    if printed.is_new(line):
                        self._write(line.partition(" ")[2])
                        since, whole, pause = time.monotonic(), False, FIRST_PAUSE_SECONDS
            except ApiException as error:
                if error.status == HTTPStatus.UNAUTHORIZED and not renewed:
                    self._cluster.renew()
                    renewed, ended = True, False
                elif error.status in (HTTPStatus.FORBIDDEN, HTTPStatus.UNAUTHORIZED):
                    self._write(f"launcher: no log: {self._cluster.refusal(doing, error)}")
                    return
                elif error.status == HTTPStatus.NOT_FOUND:
                    return
            except Unreachable:
                ended = False  # the rest of the log is still available
            if ended:
                return
            self._stopped.wait(pause)
            pause = min(max(pause, FIRST_PAUSE_SECONDS) * 2, LONGEST_PAUSE_SECONDS)

    def _lines(self, name: str, container: str, ended: bool, **options: Any) -> Iterator[str]:
        """The pod's log as it is written, each line with its timestamp.

        A line cut off with the connection is left to the next connection, unless the pod has ended.
        """
        response = self._cluster.core.read_namespaced_pod_log(
            name,
            self._cluster.namespace,
            container=container,
            follow=True,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(5, WATCH_SECONDS),
            **options,
        )
        rest = b""
        try:
            for chunk in response.stream(amt=None, decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in lines)
            if rest and ended:
                yield rest.decode("utf-8", "replace")
        finally:
            response.close()
            response.release_conn()

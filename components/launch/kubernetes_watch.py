"""Threads that keep the launcher informed: one for each kind of object it watches, one for the log of worker 0.

All outlive API outages: they resume from the last resource version or line seen, and list anew if that is too old.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from kubernetes.client.exceptions import ApiException
from kubernetes.watch import Watch

from components.launch import LaunchError
from components.launch import kubernetes_explain as explain
from components.launch.kubernetes_api import Cluster, Unreachable
from manifests.kinds import Object

# Short watches notice a connection that died silently; the server ends them and the next one resumes.
WATCH_SECONDS = 40
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0


@dataclass(frozen=True)
class Change:
    """`objects` is everything there is for type LISTED, else the one object that was ADDED, MODIFIED or DELETED."""

    kind: str
    type: str
    objects: list[Object]


class Watcher(threading.Thread):
    """Puts every change of one kind of object into `changes`, and a LaunchError if the API server forbids looking.

    Args:
        list_call: a list method of the kubernetes client, bound to its namespace and selectors.
    """

    def __init__(
        self, cluster: Cluster, kind: str, list_call: Callable[..., Any], changes: queue.Queue[Change | LaunchError]
    ) -> None:
        super().__init__(name=f"watch-{kind}", daemon=True)
        self.unreachable_since: float | None = None  # monotonic seconds; None while the API server answers
        self._cluster, self._kind, self._list, self._changes = cluster, kind, list_call, changes
        self._version: str | None = None
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            try:
                if self._version is None:
                    self._list_all()
                else:
                    self._follow()
                self.unreachable_since = None
                pause = FIRST_PAUSE_SECONDS
            except ApiException as error:
                if error.status == HTTPStatus.GONE:
                    self._version = None
                    continue
                if error.status in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
                    verb = "list" if self._version is None else "watch"
                    self._changes.put(self._cluster.refusal(f"{verb} {self._kind}", error))
                    return
                pause = self._wait(pause)
            except Unreachable:
                pause = self._wait(pause)
            except (ValueError, KeyError, TypeError):  # no answer of an API server, but of a proxy perhaps; begin anew
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


class LogFollower(threading.Thread):
    """Prints the log of one pod after another, each line once; a restarted worker is a new pod."""

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
            self._pods.put((pod["metadata"]["name"], uid, explain.container(pod)["name"]))

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
        last = ""  # time stamp of the last line printed; they sort as text
        since = time.monotonic()
        pause = FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            ended = uid in self._ended
            doing = "get pods"
            try:
                if self._cluster.core.read_namespaced_pod(name, self._cluster.namespace).metadata.uid != uid:
                    return
                doing = "get pods/log"
                lines = Watch().stream(
                    self._cluster.core.read_namespaced_pod_log,
                    name,
                    self._cluster.namespace,
                    container=container,
                    timestamps=True,
                    _request_timeout=(5, WATCH_SECONDS),
                    # Some more than has passed: what was printed already is dropped by its time stamp.
                    **({"since_seconds": int(time.monotonic() - since) + 10} if last else {}),
                )
                for line in lines:
                    stamp, _, text = line.partition(" ")
                    if stamp > last:
                        self._write(text)
                        last, since, pause = stamp, time.monotonic(), FIRST_PAUSE_SECONDS
            except ApiException as error:
                if error.status == HTTPStatus.FORBIDDEN:
                    self._write(f"launcher: no log: {self._cluster.refusal(doing, error)}")
                if error.status in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
                    return
            except Unreachable:
                pass  # tried again below
            if ended:
                return
            self._stopped.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

"""Progress and metrics of a run, posted to Kubeflow Trainer's status API, so that the TrainJob itself shows them.

Trainer from 2.3 on, with its feature gate TrainJobStatus, gives the pods of a TrainJob an address, a CA certificate and
a token in KUBEFLOW_TRAINER_SERVER_{URL,CA_CERT,TOKEN}. What is posted there appears in the job's
`status.trainerStatus`. Without these variables nothing is posted. A failure never disturbs the training.
"""

from __future__ import annotations

import json
import logging
import math
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.errors import in_words

log = logging.getLogger(__name__)

URL, CA_CERT, TOKEN = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN"))
SECONDS_BETWEEN_POSTS = 10.0  # at least; the server admits 5 requests per second of all jobs
LONGEST_PAUSE_SECONDS = 300.0  # after failures, whose pauses double
TIMEOUT_SECONDS = 5.0
MOST_METRICS, MOST_CHARACTERS, MOST_SECONDS = 256, 64, 2**31 - 1  # limits of the TrainJob's schema
LONGEST_REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` of `steps`, `seconds_left` if known, and metrics by name."""

    step: int
    steps: int
    seconds_left: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seen: float = field(default_factory=time.time)  # Unix time

    def body(self) -> dict[str, Any]:
        """The request: percentage rounded down, so that 100 is all steps; numbers of metrics as text."""
        left = self.seconds_left
        known = {} if left is None else {"estimatedRemainingSeconds": min(max(0, math.ceil(left)), MOST_SECONDS)}
        metrics = [(name[:MOST_CHARACTERS], f"{value:.6g}") for name, value in self.metrics.items()]
        return {
            "trainerStatus": {
                "progressPercentage": min(100, 100 * self.step // self.steps),
                **known,
                "metrics": [{"name": name, "value": value} for name, value in metrics[:MOST_METRICS]],
                "lastUpdatedTime": datetime.fromtimestamp(self.seen, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        }


class TrainerStatus(threading.Thread):
    """Posts the newest progress from its own thread. Created by `from_environment` and started at once.

    Args:
        url: where to post, with the job's namespace and name.
        ca_cert, token: files, which are read again for each request, because the kubelet renews them.
    """

    def __init__(self, url: str, ca_cert: Path, token: Path, pause: float = SECONDS_BETWEEN_POSTS) -> None:
        super().__init__(name="trainer-status", daemon=True)
        self._url, self._ca_cert, self._token, self._shortest = url, ca_cert, token, pause
        self._pause = pause
        self._newest: Progress | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._failed = False
        self.start()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> TrainerStatus | None:
        """None where the pod was given no status API."""
        if not all(environment.get(name) for name in (URL, CA_CERT, TOKEN)):
            return None
        return cls(environment[URL], Path(environment[CA_CERT]), Path(environment[TOKEN]))

    def update(self, progress: Progress) -> None:
        """Have this posted soon, instead of an older progress that still waits; returns at once."""
        with self._changed:
            self._newest = progress
            self._changed.notify()

    def close(self) -> None:
        """Post what waits, and end; a server that has not answered before is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.join(0 if self._failed else TIMEOUT_SECONDS)

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest or self._closed)
                progress, self._newest = self._newest, None
            if progress is None:
                return
            self._post(progress)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, self._pause)

    def _post(self, progress: Progress) -> None:
        try:
            reason = self._sent(json.dumps(progress.body()).encode())
        except Exception as error:  # whatever it is, the training goes on
            reason = in_words(error.reason if isinstance(error, urllib.error.URLError) else error)
        if not reason:
            if self._failed:
                log.info("Kubeflow Trainer's status API takes the progress again")
            self._pause, self._failed = self._shortest, False
            return
        if not self._failed:
            log.warning("the TrainJob does not show the progress, for now: %s: %s", self._url, reason)
        self._pause, self._failed = min(2 * self._pause, LONGEST_PAUSE_SECONDS), True

    def _sent(self, body: bytes) -> str:
        """Why the server refused the request; "" if it took it."""
        token = self._token.read_text(encoding="ascii").strip()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        context = ssl.create_default_context(cafile=str(self._ca_cert))
        # It is a service of the cluster, so the environment's proxies are not for it.
        straight = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), _NoRedirect()
        try:
            with urllib.request.build_opener(*straight).open(request, timeout=TIMEOUT_SECONDS):
                return ""
        except urllib.error.HTTPError as error:
            return f"{error.code} {_message(error.read(2**16))}"[:LONGEST_REASON_CHARACTERS]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The token is for this server alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _message(answer: bytes) -> str:
    """That of Kubernetes' Status object, or the text itself."""
    text = answer.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["message"])
    return " ".join(text.split())

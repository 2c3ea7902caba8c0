"""Langfuse by its own client (https://python.reference.langfuse.com/). Runs only in the senders' process.

It gets only events, all of a run on one trace, whose id follows from the run's name; no numbers of steps. Its client
speaks OpenTelemetry, which Langfuse takes from its version 3 on.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from trainer.recording.trackers.base import EventName, Refused, Tracker
from trainer.recording.trackers.keys import has_key, named, without_key
from trainer.recording.trackers.state import Place
from trainer.spec import TrainSpec
from trainer.trackerspec import LANGFUSE_HOST, LangfuseSpec

TIMEOUT_SECONDS = 5
DEFAULT_HOST = "https://cloud.langfuse.com"
DENIED = (401, 403)


class Langfuse(Tracker):
    """
    Attributes:
        place: the trace there.
    """

    remark = ""

    def __init__(self, spec: TrainSpec, wanted: LangfuseSpec, known: Place | None) -> None:
        if not has_key("langfuse"):
            raise Refused(without_key("langfuse"))
        from langfuse import Langfuse as Client

        host = wanted.host or os.environ.get(LANGFUSE_HOST) or os.environ.get("LANGFUSE_BASE_URL") or DEFAULT_HOST
        self._spec, self._heard = spec, _Complaints()
        self._client = Client(
            public_key=os.environ["LANGFUSE_PUBLIC_KEY"],
            secret_key=os.environ["LANGFUSE_SECRET_KEY"],
            base_url=host,
            timeout=TIMEOUT_SECONDS,
        )
        try:
            self._client.auth_check()
        except Exception as error:  # it has a class of its own for each status
            if getattr(error, "status_code", None) in DENIED:
                raise Refused(
                    f"Langfuse: {host} refuses the keys; the run goes on without it; set {named('langfuse')}"
                ) from None
            raise
        self._trace = self._client.create_trace_id(seed=spec.run)
        url = known.url if known else self._client.get_trace_url(trace_id=self._trace)
        self.place = Place(id=self._trace, url=url or f"{host}/trace/{self._trace}")

    def add(self, step: int, values: dict[str, float]) -> None:
        """Nothing: its traces are for events."""

    def event(self, name: EventName, values: dict[str, Any]) -> None:
        from langfuse import propagate_attributes

        with propagate_attributes(trace_name=self._spec.run[:200], tags=["yaongi", self._spec.engine]):
            self._client.create_event(
                trace_context={"trace_id": self._trace},
                name=name,
                metadata=values,
                level="ERROR" if name == "error" else "DEFAULT",
                status_message=str(values.get("reason") or "") or None,
            )
        self.flush()

    def flush(self) -> None:
        self._heard.lines.clear()
        self._client.flush()
        if self._heard.lines:
            raise RuntimeError(self._heard.lines[0])

    def close(self) -> None:
        self._client.shutdown()


class _Complaints(logging.Handler):
    """What the client's exporter logs when it cannot send; it has no other way to say so."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        for name in ("opentelemetry", "langfuse"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

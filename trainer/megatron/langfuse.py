"""Tells Langfuse of a run's start, end or error, if the variables of a secret `langfuse-secrets` are there.

By its ingestion API (https://langfuse.com/docs/api: POST /api/public/ingestion, basic authentication with the public
and the secret key): one trace for each run, and an event on it. It never fails or delays a run by more than
TIMEOUT_SECONDS. Imports no torch.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import urllib.request
import uuid
from datetime import UTC, datetime
from typing import Any, Literal

from trainer.spec import TrainSpec

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
DEFAULT_HOST = "https://cloud.langfuse.com"
Level = Literal["DEFAULT", "ERROR"]


def tell(spec: TrainSpec, name: str, level: Level = "DEFAULT", **values: Any) -> None:
    """Send the event `name` of the run; nothing without LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY."""
    public, secret = os.environ.get("LANGFUSE_PUBLIC_KEY"), os.environ.get("LANGFUSE_SECRET_KEY")
    if not public or not secret:
        return
    host = (os.environ.get("LANGFUSE_HOST") or os.environ.get("LANGFUSE_BASE_URL") or DEFAULT_HOST).rstrip("/")
    now = datetime.now(UTC).isoformat()
    trace = {"id": spec.run, "name": spec.run, "tags": ["yaongi", spec.engine], "timestamp": now}
    event = {"id": str(uuid.uuid4()), "traceId": spec.run, "name": name, "startTime": now, "level": level}
    if level == "ERROR":
        event["statusMessage"] = str(values.get("reason", ""))
    bodies = {"trace-create": trace, "event-create": {**event, "metadata": values}}
    batch = [{"id": str(uuid.uuid4()), "type": kind, "timestamp": now, "body": body} for kind, body in bodies.items()]
    request = urllib.request.Request(
        f"{host}/api/public/ingestion",
        json.dumps({"batch": batch}).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(f'{public}:{secret}'.encode()).decode()}",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            refused = json.loads(answer.read() or b"{}").get("errors")
        if refused:  # it answers 207 and says which of the batch it did not take
            log.warning("Langfuse (%s) did not take the event %s: %s", host, name, json.dumps(refused)[:200])
    except (OSError, ValueError) as error:
        log.warning("Langfuse (%s) was not told of %s: %s; the run goes on", host, name, error)

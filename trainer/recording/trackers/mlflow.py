"""MLflow by its own client (https://mlflow.org/docs/latest/api_reference/). Runs only in the senders' process.

One run of MLflow for a run: its id is in trackers.json, because the server chooses it. A step that is trained again is
a second point of that step; MLflow shows the newer one.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

from trainer.fields import stored
from trainer.recording.trackers.base import STOPPED, EventName, Refused, Tracker, flat, numbers
from trainer.recording.trackers.keys import named
from trainer.recording.trackers.state import Place
from trainer.spec import TrainSpec
from trainer.trackerspec import MlflowSpec

MOST_METRICS, MOST_PARAMS, LONGEST_VALUE = 1000, 100, 500  # of one request, and of a parameter's value in old servers
MOST_KEPT = 20_000  # points while the server is down
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
STATES = {"start": "RUNNING", "restart": "RUNNING", "end": "FINISHED", "error": "FAILED"}


class Mlflow(Tracker):
    """
    Attributes:
        place: the run there.
    """

    remark = ""

    def __init__(self, spec: TrainSpec, wanted: MlflowSpec, known: Place | None) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=wanted.tracking_uri)
        self._kept: list[tuple[str, float, int, int]] = []
        try:
            found = self._client.get_experiment_by_name(wanted.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(wanted.experiment)
            self._id = self._known(known) or self._made(spec, experiment)
        except MlflowException as error:
            if error.get_http_status_code() in (401, 403):
                raise Refused(
                    f"MLflow: {wanted.tracking_uri} refuses the key; the run goes on without it; set {named('mlflow')}"
                ) from None
            raise
        url = f"{wanted.tracking_uri}/#/experiments/{experiment}/runs/{self._id}"
        self.place = Place(id=self._id, url=url)
        self._told = known is not None  # a run that goes on was told already that it runs

    def add(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._kept += [(_NOT_IN_NAMES.sub("_", name), value, now, step) for name, value in values.items()]
        del self._kept[:-MOST_KEPT]

    def flush(self) -> None:
        from mlflow.entities import Metric

        while batch := self._kept[:MOST_METRICS]:
            self._client.log_batch(self._id, metrics=[Metric(*point) for point in batch], synchronous=True)
            del self._kept[: len(batch)]

    def event(self, name: EventName, values: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        told = json.dumps({"time": round(time.time(), 3), **values}, ensure_ascii=False)
        tags = [RunTag(f"yaongi.{name}", told[:5000])]
        self._client.log_batch(self._id, tags=tags, synchronous=True)
        if state := STATES.get(name):
            state = "KILLED" if values.get("state") == STOPPED else state
            if state == "RUNNING":
                self._client.update_run(self._id, status=state)
            else:
                self._client.set_terminated(self._id, state)

    def summary(self, values: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        step = int(values.get("step") or values.get("steps") or 0)
        self.add(step, {f"summary/{name}": value for name, value in numbers(values).items()})
        texts = [RunTag(f"yaongi.{key}", value[:5000]) for key, value in flat(values).items() if isinstance(value, str)]
        self._client.log_batch(self._id, tags=texts, synchronous=True)
        self.flush()

    def close(self) -> None:
        self.flush()

    def _known(self, known: Place | None) -> str | None:
        """The id of the run's earlier start; None if there is none, or it was deleted there."""
        from mlflow.exceptions import MlflowException

        if known is None:
            return None
        try:
            run = self._client.get_run(known.id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return known.id if run.info.lifecycle_stage == "active" else None

    def _made(self, spec: TrainSpec, experiment: str) -> str:
        from mlflow.entities import Param

        made: str = self._client.create_run(experiment, run_name=spec.run, tags={"yaongi.run": spec.run}).info.run_id
        params = [
            Param(name, (value if isinstance(value, str) else json.dumps(value))[:LONGEST_VALUE])
            for name, value in flat(stored(spec)).items()
        ]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(made, params=params[start : start + MOST_PARAMS], synchronous=True)
        return made

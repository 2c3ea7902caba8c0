"""Weights & Biases by its own client (https://docs.wandb.ai/ref/python/). Runs only in the senders' process.

One run of W&B for a run, also after restarts: its id is the run's name. W&B wants its own steps to increase, so the
step is a value and the x axis: a resumed run may go back. Without a key, or if the server does not answer, the run is
recorded in run_dir/wandb, from where `wandb sync` sends it. Nothing of the machine, its packages or the code is sent.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from trainer.fields import stored
from trainer.recording.trackers.base import EventName, Tracker, flat
from trainer.recording.trackers.keys import has_key, in_short, without_key
from trainer.recording.trackers.state import Place
from trainer.spec import TrainSpec
from trainer.trackerspec import WandbSpec

INIT_SECONDS = 20.0
LONGEST_ID = 64
STEP, EVENTS = "step", "event"


class Wandb(Tracker):
    """
    Attributes:
        place: the run there.
        remark: why the run is recorded offline; "" if it is not.
    """

    def __init__(self, spec: TrainSpec, wanted: WandbSpec, known: Place | None) -> None:
        self._directory, self._failed = Path(spec.run_dir), True  # until its end is told
        name = known.id if known else re.sub(r"[^A-Za-z0-9_-]", "-", spec.run)[-LONGEST_ID:]
        os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        if wanted.host:
            os.environ["WANDB_BASE_URL"] = wanted.host
        self.remark = "" if has_key("wandb") else without_key("wandb") or ""
        mode = "offline" if self.remark else os.environ.get("WANDB_MODE", "online")
        try:
            self._run = _begin(spec, wanted, name, mode)
        except Exception as error:  # its own errors, and those of its background process
            if mode != "online":
                raise
            self.remark = (
                f"Weights & Biases: {in_short(error)}; the run is recorded offline in {self._directory / 'wandb'}; "
                "look after the server and WANDB_API_KEY, and send it by `wandb sync`"
            )
            import wandb

            wandb.teardown()  # else its background process still holds the id
            self._run = _begin(spec, wanted, name, "offline")
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        self.place = Place(id=name, url="" if self._run.offline else self._run.url or (known and known.url) or "")

    def add(self, step: int, values: dict[str, float]) -> None:
        self._run.log({STEP: step, **values})

    def event(self, name: EventName, values: dict[str, Any]) -> None:
        if name in ("start", "restart"):
            self._failed = True
        elif name in ("end", "evaluation"):  # what is evaluated has been trained
            self._failed = False
        told = {key: value for key, value in flat(values).items() if value is not None}
        # The summary shows the last one of each kind; what happened when is in the history.
        self._run.summary.update({f"{EVENTS}.{name}": told})
        if (step := told.get(STEP)) is not None:
            self._run.log({STEP: step, f"{EVENTS}/{name}": told.get("reason") or name})

    def summary(self, values: dict[str, Any]) -> None:
        self._run.summary.update({key: value for key, value in flat(values).items() if value is not None})

    def flush(self) -> None:
        """Its background process sends by itself."""

    def close(self) -> None:
        self._run.finish(exit_code=int(self._failed))


def _begin(spec: TrainSpec, wanted: WandbSpec, name: str, mode: Any) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        init_timeout=INIT_SECONDS,
        silent=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_graphql_timeout_seconds=INIT_SECONDS / 2,
        x_save_requirements=False,
    )
    return wandb.init(
        project=wanted.project,
        entity=wanted.entity,
        id=name,
        name=spec.run,
        dir=spec.run_dir,
        config=stored(spec),
        allow_val_change=True,
        resume="allow" if mode == "online" else None,
        mode=mode,
        settings=settings,
    )

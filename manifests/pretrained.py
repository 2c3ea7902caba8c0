"""Trained models that a job names: a folder (its path begins with / or .), the name of a run on the checkpoints volume,
or owner/name or owner/name@revision on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from trainer.checkpoints.checkpoint import step_dir
from trainer.specbase import canonical_digest

RUN_NAME = re.compile(r"(?P<run>[a-z][-a-z0-9]*)(@(?P<step>\d{1,18}))?")
HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


class HubModel(NamedTuple):
    """A model on the Hub; `revision` is a branch, tag or commit."""

    name: str
    revision: str = "main"

    @property
    def key(self) -> str:
        """The name of its folder below `models` on the datasets volume."""
        return f"{self.name.replace('/', '--')}-{canonical_digest(['model', *self])}"


def hub_model(named: str) -> HubModel | None:
    """The model on the Hub that a name refers to. None for a run, whose name has no /, and for a folder, whose path
    begins with / or . or has several /."""
    found = HUB_NAME.fullmatch(named)
    return HubModel(found["name"], found["revision"] or "main") if found else None


def folder_of(named: str, datasets_dir: str, checkpoints_dir: str, sources_dir: str | None) -> str:
    """The folder of a named model, which may still have to be downloaded. Relative paths start in `sources_dir`."""
    if found := RUN_NAME.fullmatch(named):
        run_dir = f"{checkpoints_dir}/runs/{found['run']}"
        return str(step_dir(run_dir, int(found["step"]))) if found["step"] else run_dir
    if hub := hub_model(named):
        return f"{datasets_dir}/models/{hub.key}"
    return os.path.abspath(os.path.join(sources_dir or "", os.path.expanduser(named)))

"""trackers.json in the run directory: the run's name and page at each tracker, and whether its end has been told.

Only the process that talks to the trackers writes it (sender.py). It holds no keys. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.files import atomic_write
from trainer.recording.trackers.keys import TITLES

FILE = "trackers.json"

log = logging.getLogger(__name__)


class Place(BaseModel):
    """A run at one tracker; `url` is "" where it has no page, as a run of W&B that is offline."""

    model_config = ConfigDict(extra="ignore")
    id: str
    url: str = ""


class State(BaseModel):
    """
    Attributes:
        started: Unix time of the training process that opened the trackers last; 0 before the first.
        host: its machine.
        told: whether its end has been told; if not, it was killed, or still runs.
    """

    model_config = ConfigDict(extra="ignore")
    places: dict[str, Place] = {}
    started: float = 0.0
    host: str = ""
    told: bool = True

    def write(self, run_dir: str | Path) -> None:
        """
        Raises:
            OSError: the directory cannot be written.
        """
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        atomic_write(Path(run_dir) / FILE, self.model_dump_json(indent=1).encode())


def read(run_dir: str | Path) -> State:
    """The file's content; an empty one if there is none or it is damaged, as no run may depend on it."""
    file = Path(run_dir) / FILE
    try:
        return State.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return State()
    except (OSError, ValidationError) as error:
        log.warning("%s cannot be read (%s); the trackers' runs may begin anew", file, type(error).__name__)
        return State()


def links_in(lines: Iterable[str]) -> dict[str, str]:
    """The same from the lines of rank 0's log, where the run directory cannot be read."""
    found = (re.fullmatch(rf"({'|'.join(TITLES.values())}): (https?://\S+)", line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def links(run_dir: str | Path) -> dict[str, str]:
    """The address of the run's page by the tracker's title, for `status` and the report."""
    try:
        found: dict[str, Any] = json.loads((Path(run_dir) / FILE).read_bytes()).get("places", {})
        return {title: found[name]["url"] for name, title in TITLES.items() if found.get(name, {}).get("url")}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}

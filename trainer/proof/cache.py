"""Where records and trials are kept: a cache directory of the machine, and the run's own directory.

A file holds for one environment only: card, driver, versions, and the code of our own operations. It is a cache: what
cannot be read is made again, what cannot be written is said once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer import parity
from trainer.files import atomic_write
from trainer.ops import Setting
from trainer.ops.check import device_name
from trainer.parity import Record, plain
from trainer.preflight.gpus import driver_cuda_version

log = logging.getLogger(__name__)

PACKAGES = ("torch", "triton", "mamba_ssm", "causal_conv1d", "flash_attn", "transformer_engine")
_CODE = ("ops", "fp8", "proof")  # folders whose sources decide what is computed here


@dataclass
class Known:
    """What a file holds: records, and by the digest of a model and its settings the outcome of a trial."""

    records: list[Record] = field(default_factory=list)
    trials: dict[str, Any] = field(default_factory=dict)


def environment(device: torch.device) -> dict[str, str | None]:
    """Everything that a record is about besides the operation."""
    driver = driver_cuda_version() if device.type == "cuda" else None
    return {
        "device": device_name(device),
        "device_class": Setting(device).device_class,
        "driver": ".".join(map(str, driver)) if driver else None,
        "cuda": torch.version.cuda,
        "code": _code(),
    } | {name: parity.package_version(name) for name in PACKAGES}


@cache
def _code() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for folder in _CODE:
        for file in sorted((package / folder).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def directory() -> Path:
    """`yaongi` in the user's cache directory (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yaongi"


def files(device: torch.device, run_dir: str | None) -> list[Path]:
    """The places of this environment's file, the run's own first."""
    about = environment(device)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    name = f"proof-{about['device_class']}-{digest}.json"
    return [*([Path(run_dir) / name] if run_dir else []), directory() / name]


def read(places: list[Path]) -> Known:
    """All that the files hold; of a record the one in the first file counts."""
    known, records = Known(), dict[tuple[str, ...], Record]()
    for file in reversed(places):
        try:
            content = json.loads(file.read_text("utf-8"))
            records |= {record.key: record for record in (Record(**entry) for entry in content["records"])}
            known.trials |= content["trials"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s cannot be read (%s) and is made again", file, type(error).__name__)
    known.records = list(records.values())
    return known


def write(places: list[Path], known: Known, device: torch.device) -> list[str]:
    """Keep it in every place; returns what could not be written, a line each."""
    content = {
        "environment": environment(device),
        "records": [plain(record) for record in sorted(known.records, key=lambda record: record.key)],
        "trials": known.trials,
    }
    problems = []
    for file in places:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, json.dumps(content, indent=1).encode())
        except OSError as error:
            problems.append(f"{file.parent} cannot be written ({error.strerror}), so the proof is made at every start")
    return problems

"""Where records and trials are kept: a cache directory of the machine, and the run's own directory.

A file holds for one environment only: card, driver, versions, and the code of our own operations. It is a cache: what
cannot be read is made again, what cannot be written is said once. Several nodes and runs may share a place, so what is
there is kept, and of two records of a comparison the one that failed counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from trainer import parity, precision
from trainer.ops import OPS, Setting
from trainer.ops.check import device_name
from trainer.parity import Record, plain
from trainer.preflight.gpus import driver_cuda_version

log = logging.getLogger(__name__)

_UNDER = ("torch", "triton", "nvidia-cutlass-dsl")  # what kernels are compiled by
OTHER_RUNS = 4  # newest ones
DRIVER = Path("/proc/driver/nvidia/version")  # Linux; its first line names the driver's own version
LARGEST_BYTES = 2**24  # of a file; a record has about 500
_CODE = ("ops", "kernels", "fp8", "proof")  # folders whose sources decide what is computed here


@dataclass
class Known:
    """What a file holds.

    Attributes:
        unsupported: by comparison, why it cannot run here; None if it can.
        refused: by module, what its import does to a process.
        slow: comparisons that have taken too long once, which may have been their compilation.
        trials: the outcome of a trial, by the digest of a model and its settings.
    """

    records: list[Record] = field(default_factory=list)
    unsupported: dict[str, str | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)
    trials: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Known) -> None:
        """Take what another file holds; of two records of a comparison, one that failed is kept, else the newer."""
        merged = {record.key: record for record in self.records}
        for record in other.records:
            if record.key not in merged or merged[record.key].passed:
                merged[record.key] = record
        self.records = [merged[key] for key in sorted(merged)]
        self.unsupported |= other.unsupported
        self.refused |= other.refused
        self.slow = sorted({*self.slow, *other.slow})
        self.trials |= other.trials


_KNOWN = TypeAdapter(Known)


def environment(device: torch.device) -> dict[str, str | None]:
    """Everything that a record is about besides the operation."""
    driver = driver_cuda_version() if device.type == "cuda" else None
    try:
        build = DRIVER.read_text("utf-8").partition("\n")[0] if driver else None
    except (OSError, ValueError):
        build = None
    return {
        "device": device_name(device),
        "device_class": Setting(device).device_class,
        "driver": ".".join(map(str, driver)) if driver else None,
        "driver_build": build,
        "cuda": torch.version.cuda,
        "code": _code(),
    } | {name: parity.package_version(name) for name in packages()}


def packages() -> list[str]:
    """Distributions on whose versions a comparison depends."""
    ours = {backend.package for op in OPS.values() for backend in op.backends.values()}
    return sorted({*ours, *precision.PACKAGES.values(), *_UNDER})


@cache
def _code() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for folder in _CODE:
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def directory() -> Path:
    """`yaongi` in the user's cache directory (XDG_CACHE_HOME); in the one for temporary files if there is no user."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "yaongi"
    try:
        return Path.home() / ".cache" / "yaongi"
    except RuntimeError:  # a number without a name and without HOME, as containers may have
        return Path(tempfile.gettempdir()) / f"yaongi-{os.getuid()}"


def files(device: torch.device, run_dir: str | None) -> list[Path]:
    """The places of this environment's file, the run's own first."""
    about = environment(device)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    name = f"proof-{about['device_class']}-{digest}.json"
    return [*([Path(run_dir) / name] if run_dir else []), directory() / name]


def read(places: list[Path], device: torch.device) -> Known:
    """All that the files hold."""
    known = Known()
    for file in reversed(places):
        if (found := _read(file, device)) is not None:
            known.add(found)
    return known


def of_other_runs(run_dir: str, device: torch.device) -> Known:
    """What has passed in the newest runs beside this one: a pod's own cache directory is lost with it.

    What failed is not taken over, so that a run can be asked to compare again.
    """
    own = files(device, run_dir)[0]
    try:
        found = [(file.stat().st_mtime, file) for file in own.parent.parent.glob(f"*/{own.name}") if file != own]
    except OSError:
        return Known()
    known = read([file for _, file in sorted(found)[-OTHER_RUNS:]], device)
    fits: dict[str, str | None] = {
        comparison: None for comparison, reason in known.unsupported.items() if reason is None
    }
    return Known([record for record in known.records if record.passed], fits)


def _read(file: Path, device: torch.device) -> Known | None:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_BYTES:  # a pipe would never end
            raise ValueError
        content = json.loads(file.read_bytes())
        if content.pop("environment") != environment(device) or content.keys() != vars(Known()).keys():
            raise ValueError
        found = _KNOWN.validate_python(content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _warn_once(f"proof: {file} cannot be read ({error.strerror}) and is made again")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _warn_once(f"proof: {file} is damaged and is made again")
    else:
        return found
    return None


@cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)


def write(places: list[Path], known: Known, device: torch.device) -> list[str]:
    """Keep it in every place, beside what others have written there meanwhile. Returns what cannot be, a line each."""
    problems = []
    for file in places:
        all_known = _read(file, device) or Known()
        all_known.add(known)
        content = {
            "environment": environment(device),
            "records": [plain(record) for record in all_known.records],
            "unsupported": all_known.unsupported,
            "refused": all_known.refused,
            "slow": all_known.slow,
            "trials": all_known.trials,
        }
        draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(content, indent=1), "utf-8")
            os.replace(draft, file)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            problems.append(f"{file.parent} cannot be written ({error.strerror}), so the proof is not kept there")
    return problems

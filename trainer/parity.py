"""Parity records: where and in which versions an implementation was shown equal to its reference. No torch.

A record is one row of `trainer/ops/parity/<device class>.json`, written by `benchmarks/parity.py` on a machine of that
class and committed, or one that this machine has made at the start of a run (trainer/proof). `auto` relies only on
these: an implementation without a passing record for its package's version, the device class and the number format is
unproven there. Device classes are `cpu`, `sm_90`, `sm_80`, …
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

DIRECTORY = Path(__file__).parent / "ops" / "parity"


@dataclass(frozen=True)
class Record:
    """Outcome of one comparison with the reference.

    Attributes:
        variant: number format (`fp32`, `bf16`, `fp16`) or, for FP8, the recipe.
        package, version: the package of the implementation; torch's version is without build suffix.
        forward_error, backward_error: largest |difference| over all cases, as a part of the largest reference value.
        leak: change of outputs and gradients due to another document in the row, on the same scale.
        tolerance: limit of all three.
        problem: why there are no figures (it crashed, say); None if there are.
    """

    op: str
    backend: str
    variant: str
    package: str
    version: str
    torch: str
    device_class: str
    device: str
    forward_error: float
    backward_error: float
    leak: float
    tolerance: float
    passed: bool
    problem: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """The key by which a later run of the same comparison replaces this record."""
        return self.op, self.backend, self.variant, self.package, self.version, self.torch, self.device_class

    @property
    def outcome(self) -> str:
        """What was found, in words."""
        if self.problem:
            return self.problem
        errors = {"outputs": self.forward_error, "gradients": self.backward_error, "other documents": self.leak}
        part, error = max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
        if self.passed:
            return f"within {error:.1e} of its reference"
        return f"{part} differ by {error:.1e} of the reference's, {self.tolerance:.0e} is allowed"


def package_version(package: str) -> str | None:
    """Installed version of a distribution without local build suffix; None if it is not installed."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def committed(directory: Path = DIRECTORY) -> tuple[Record, ...]:
    """All records committed with this code."""
    return tuple(
        Record(**entry) for file in sorted(directory.glob("*.json")) for entry in json.loads(file.read_text("utf-8"))
    )


_learned: dict[tuple[str, ...], Record] = {}


def learn(records: Iterable[Record]) -> None:
    """Let `proven` rely on these, too, in this process."""
    _learned.update({record.key: record for record in records})


def forget() -> None:
    """Rely on the committed records alone again."""
    _learned.clear()


def known(op: str, backend: str, variant: str, device_class: str, version: str | None) -> list[Record]:
    """The records of a combination, committed ones first."""
    return [
        record
        for record in (*committed(), *_learned.values())
        if (record.op, record.backend, record.variant, record.device_class, record.version)
        == (op, backend, variant, device_class, version)
    ]


def proven(op: str, backend: str, variant: str, device_class: str, version: str | None) -> bool:
    """Whether this combination has a passing record and no failing one."""
    found = known(op, backend, variant, device_class, version)
    return bool(found) and all(record.passed for record in found)


def failure(op: str, backend: str, variant: str, device_class: str, version: str | None) -> str | None:
    """The outcome of a failing record of this combination; None without one."""
    found = known(op, backend, variant, device_class, version)
    return next((record.outcome for record in found if not record.passed), None)


def device_classes(op: str, backend: str) -> list[str]:
    """Device classes on which some version of a backend has passed in some number format."""
    return sorted({r.device_class for r in committed() if (r.op, r.backend) == (op, backend) and r.passed})


def write(records: Iterable[Record], directory: Path = DIRECTORY) -> list[Path]:
    """Merge records into the files of their device classes; a rerun replaces its earlier rows. Returns the files."""
    by_class: dict[str, dict[tuple[str, ...], Record]] = {}
    for record in records:
        by_class.setdefault(record.device_class, {})[record.key] = record
    files = []
    for device_class, fresh in by_class.items():
        file = directory / f"{device_class}.json"
        known = json.loads(file.read_text("utf-8")) if file.exists() else []
        merged = {record.key: record for record in (Record(**entry) for entry in known)} | fresh
        lines = [json.dumps(plain(record)) for _, record in sorted(merged.items())]
        partial = file.with_suffix(".partial")
        partial.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")
        os.replace(partial, file)
        files.append(file)
    return files


def plain(record: Record) -> dict[str, object]:
    """As it is written."""
    return {name: value for name, value in asdict(record).items() if name != "problem" or value is not None}

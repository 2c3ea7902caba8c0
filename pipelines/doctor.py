"""What this machine can do, found out by trying."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from components.launch import LaunchError

MIN_PYTHON = (3, 11)
MIN_FREE_GIB = 2.0
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """`state`: "no" stops every run on this machine, "missing" only what needs it."""

    what: str
    state: Literal["ok", "missing", "no"]
    detail: str


def report(workdir: Path, console: Console) -> bool:
    """Print the findings; False when one of them stops a local run."""
    table = Table(show_header=False, box=None)
    found = list(findings(workdir))
    colours = {"ok": "green", "missing": "yellow", "no": "red"}
    for finding in found:
        table.add_row(finding.what, f"[{colours[finding.state]}]{finding.state}[/]", finding.detail)
    console.print(table)
    return all(finding.state != "no" for finding in found)


def findings(workdir: Path) -> Iterator[Finding]:
    checks: list[Callable[[Path], Iterator[Finding]]] = [_python, _machine, _torch, _cluster]
    for check in checks:
        yield from check(workdir)


def _python(workdir: Path) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= MIN_PYTHON
    yield Finding("Python", "ok" if good else "no", version if good else f"{version}; 3.11 or newer is needed")


def _machine(workdir: Path) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("machine", "ok", f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory")
    place = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / GIB
    enough = free >= MIN_FREE_GIB and os.access(place, os.W_OK)
    yield Finding("disk", "ok" if enough else "no", f"{free:.0f} GiB free at {place}; {MIN_FREE_GIB:.0f} are needed")


def _torch(workdir: Path) -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("PyTorch", "no", f"{error}; make setup installs it")
        return
    yield Finding("PyTorch", "ok", torch.__version__)
    if not torch.cuda.is_available():
        yield Finding("GPU", "missing", "none; training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        yield Finding(f"GPU {index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {capability}")


def _cluster(workdir: Path) -> Iterator[Finding]:
    from components.launch.kubernetes_api import Cluster

    try:
        cluster = Cluster.connect()
        cluster.get("PyTorchJob", "yaongi-doctor")
    except LaunchError as error:
        yield Finding("cluster", "missing", str(error))
    else:
        yield Finding("cluster", "ok", f"{cluster.server} knows PyTorchJob; namespace {cluster.namespace}")

"""Test what this machine can do."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.running import one_line
from manifests.paths import whole
from pipelines.doctor.findings import Finding
from pipelines.ports import problem
from trainer.errors import ForeseenError, in_words
from trainer.thismachine import DEFAULT_PORT

MIN_PYTHON = (3, 11)
MIN_FREE_GIB = 2.0
MIN_SHM_GIB = 1.0
SHM = Path("/dev/shm")
METRICS_PORT = DEFAULT_PORT
GIB = 2**30
TOOLS = {"kubectl": "to apply manifests and look at clusters", "helm": "to install the chart"}


def findings(workdir: Path, *, with_tools: bool = True) -> Iterator[Finding]:
    """The checks of this machine.

    Args:
        with_tools: also look for the commands that only clusters need.
    """
    checks: list[Callable[[Path], Iterator[Finding]]] = [
        _python,
        _machine,
        _shared_memory,
        _torch,
        _metrics_port,
        *([_tools] if with_tools else []),
    ]
    for check in checks:
        yield from check(workdir)


def of_job(job: str, changes: dict[str, Any], workdir: Path) -> Iterator[Finding]:
    """The checks that `yaongi run` makes before it begins. Ports are skipped for a run that is alive: it holds them.

    Args:
        job: a preset's name or a job file.
        changes: the fields of `--set`.
    """
    from pipelines import background, ports, refusals
    from pipelines.run import local_job

    try:
        spec, _ = local_job(job, changes, target="local", workdir=workdir)
    except ForeseenError as error:
        yield Finding("job", "no", one_line(error))
        return
    for what, check in refusals.checks(spec, ports.written(job, changes)).items():
        if what == "ports" and background.is_alive(workdir, spec.run_name):
            continue
        try:
            check()
        except ForeseenError as error:
            yield Finding(what, "no", one_line(error))
        else:
            yield Finding(what, "ok", "nothing in the way")
    for line in refusals.remarks(spec):
        yield Finding("trackers", "missing", line)


def _python(workdir: Path) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= MIN_PYTHON
    yield Finding("Python", "ok" if good else "no", version if good else f"{version}; 3.11 or newer is needed")


def _machine(workdir: Path) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("machine", "ok", f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory")
    place = next(path for path in (whole(workdir), *whole(workdir).parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=place))
    except OSError as error:
        detail = f"no folder can be made in {place} ({in_words(error.strerror)})"
        yield Finding("disk", "no", detail, "give another --workdir")
        return
    free = shutil.disk_usage(place).free / GIB
    enough = free >= MIN_FREE_GIB
    yield Finding(
        "disk", "ok" if enough else "no", f"{free:.0f} GiB free at {place}; a small job takes {MIN_FREE_GIB:.0f}"
    )


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


def _shared_memory(workdir: Path) -> Iterator[Finding]:
    if not SHM.is_dir():
        return
    size = shutil.disk_usage(SHM).total / GIB
    few = "raise it for several GPUs or loader processes (docker run --shm-size, mount -o remount,size=)"
    yield Finding(
        str(SHM), "ok" if size >= MIN_SHM_GIB else "missing", f"{size:.1f} GiB", "" if size >= MIN_SHM_GIB else few
    )


def _metrics_port(workdir: Path) -> Iterator[Finding]:
    if what := problem(METRICS_PORT):
        detail = f"{METRICS_PORT} {what}, perhaps by another run or a GPU exporter; a run here takes the next free one"
        yield Finding("metrics port", "ok", detail)
    else:
        yield Finding("metrics port", "ok", f"{METRICS_PORT} is free")


def _tools(workdir: Path) -> Iterator[Finding]:
    for tool, purpose in TOOLS.items():
        found = shutil.which(tool)
        yield Finding(tool, "ok" if found else "missing", found or f"not in PATH; needed only {purpose}")

"""Memory of this process, and the limit of its container or machine. Imports no torch."""

from __future__ import annotations

import os
import resource
from pathlib import Path

# The limit of this container in its own view: cgroup v2, then v1. "max", or more than all memory, means no limit.
KILL_FILES = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident memory of this process; its peak where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def out_of_memory_kills() -> int:
    """Number of this container's processes that the kernel's OOM killer has killed; 0 if unknown."""
    for file in KILL_FILES:
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        for name, _, count in (line.partition(" ") for line in lines):
            if name == "oom_kill" and count.isdigit():
                return int(count)
    return 0


def limit_bytes() -> int:
    """Bytes at which processes here are killed: the container's limit, at most the machine's memory."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in LIMIT_FILES:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit

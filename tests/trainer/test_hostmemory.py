"""The memory of the process and its limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trainer.process import hostmemory
from trainer.process.owntime import OwnTime

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("content", "limit"),
    [("1073741824\n", 2**30), ("max\n", MACHINE), ("9223372036854771712\n", MACHINE), (None, MACHINE)],
    ids=["limited", "v2 without limit", "v1 without limit", "no such file"],
)
def test_the_limit_is_the_containers_or_what_the_machine_has(
    content: str | None, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memory.max"
    if content:
        file.write_text(content)
    monkeypatch.setattr(hostmemory, "LIMIT_FILES", (tmp_path / "absent", file))
    assert hostmemory.limit_bytes() == limit


def test_the_peak_is_that_of_this_process() -> None:
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    by_kernel = int(status["VmHWM"].split()[0]) * 1024
    assert 0.95 * by_kernel <= hostmemory.peak_bytes() <= MACHINE


def test_own_time_is_that_of_the_measured_blocks_and_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("trainer.process.owntime.time.perf_counter", lambda: now)
    own = OwnTime(torch.device("cpu"))
    for seconds in (2.0, 3.0):
        with own.measured():
            now += seconds
        now += 100  # waiting for others
    assert own.take() == 5
    assert own.take() == 0

"""The launcher's lease, as read by the trainer and by a second launcher."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from waiting import wait_until

from components.launch import lease as lease_module
from components.launch.lease import LEASE_SECONDS, RENEWAL_SECONDS, held
from trainer.errors import LaunchError
from trainer.files import atomic_write
from trainer.process import limits
from trainer.process.limits import MISSED_RENEWALS, UNWATCHED_VARIABLE, Lease, LeaseWatch, Limits

QUICK = {"lease_seconds": 1.0, "renewal_seconds": 0.2}


class Clock:
    """Replaces the module `time` for the process that watches a lease, so that a busy machine has no influence.

    A launcher's thread still renews by real time.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(limits, "time", made)
    monkeypatch.setattr(lease_module, "time", made)
    return made


def lapses_within(watch: LeaseWatch, seconds: float, clock: Clock) -> bool:
    end = clock.now + seconds
    while clock.now < end:
        if watch.lapsed():
            return True
        clock.sleep(0.05)
    return False


def renews() -> bool:
    """Whether a launcher of this process still does."""
    return any(thread.name == "lease" for thread in threading.enumerate())


def write(run: Path, renewed: float, **changes: float) -> None:
    """The lease of a launcher that has just died."""
    fields = {"renewal_seconds": QUICK["renewal_seconds"], "lapses_after_seconds": QUICK["lease_seconds"], **changes}
    run.mkdir(parents=True, exist_ok=True)
    atomic_write(run / "lease", json.dumps(asdict(Lease("gone", renewed, **fields))).encode())


def test_a_killed_launcher_leaves_the_workers_time_for_a_checkpoint_within_a_minute() -> None:
    assert LEASE_SECONDS + RENEWAL_SECONDS / 8 + 20 <= 60
    assert LEASE_SECONDS >= 4 * RENEWAL_SECONDS, "four renewals may be lost"
    assert MISSED_RENEWALS * RENEWAL_SECONDS < LEASE_SECONDS, "a new launcher takes over before the run ends itself"


def test_a_held_lease_is_renewed_and_given_back(tmp_path: Path, clock: Clock) -> None:
    run = tmp_path / "runs" / "r"
    watch = LeaseWatch(run)
    with held(run, **QUICK):
        for renewals in (1, 2, 3):
            wait_until(lambda wanted=renewals: not watch.lapsed() and watch.renewals >= wanted)
            clock.sleep(0.9)
            assert not watch.lapsed(), "each renewal gives it another second"
        assert renews()
    assert not renews()
    assert not lapses_within(watch, 1.2, clock), "a run that nobody launches any more has no limit"


@pytest.mark.parametrize("skew", [-300.0, 0.0, 300.0])
def test_silence_is_counted_by_the_readers_own_clock(tmp_path: Path, skew: float, clock: Clock) -> None:
    watch = LeaseWatch(tmp_path)
    write(tmp_path, time.time() + skew - 1)
    assert not watch.lapsed()
    write(tmp_path, time.time() + skew)
    assert not lapses_within(watch, 0.8, clock), "it was renewed just now"
    assert lapses_within(watch, 0.5, clock)


def test_a_worker_that_was_restarted_waits_less_for_a_launcher_it_has_not_heard_of(
    tmp_path: Path, clock: Clock
) -> None:
    write(tmp_path, time.time())
    begun = clock.now
    assert lapses_within(LeaseWatch(tmp_path), 2, clock)
    assert 0.4 < clock.now - begun < 0.9


def test_time_in_which_the_volume_did_not_answer_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = LeaseWatch(tmp_path)
    for renewed in (1.0, 2.0):
        write(tmp_path, time.time() + renewed, lapses_after_seconds=30.0)
        assert not watch.lapsed()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 600)  # the next read takes ten minutes
    assert not watch.lapsed() and watch.silent_seconds < 5
    (tmp_path / "lease").unlink()
    (tmp_path / "lease").mkdir()  # a read that fails
    monkeypatch.setattr(time, "monotonic", lambda: now + 1200)
    assert not watch.lapsed() and watch.silent_seconds < 5


def test_a_dead_launchers_lease_is_taken_over_before_it_lapses(tmp_path: Path, clock: Clock) -> None:
    run = LeaseWatch(tmp_path)
    for renewed in (1.0, 0.0):
        write(tmp_path, time.time() - renewed)
        assert not run.lapsed()
    begun = clock.now
    with held(tmp_path, **QUICK):
        assert 0.4 < clock.now - begun < 0.9
        assert not run.lapsed() and run.lease.holder != "gone", "the run would have ended itself"


def test_a_lease_of_long_ago_ends_the_run_and_is_taken_over_at_once(tmp_path: Path, clock: Clock) -> None:
    write(tmp_path, time.time() - 3600, renewal_seconds=8.0, lapses_after_seconds=36.0)
    reason = Limits(tmp_path).passed()
    assert "not renewed its lease" in reason and f"delete {tmp_path / 'lease'}" in reason
    begun = clock.now
    with held(tmp_path):
        assert clock.now - begun < 1
        assert Limits(tmp_path).passed() is None


def test_a_former_launchers_lease_does_not_end_a_run_that_nobody_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    write(tmp_path, time.time() - 3600)
    monkeypatch.setenv(UNWATCHED_VARIABLE, "1")
    run = Limits(tmp_path)
    assert run.passed() is None
    write(tmp_path, time.time())  # a launcher takes it over and dies
    assert run.passed() is None
    clock.sleep(1.1)
    assert "not renewed its lease" in (run.passed() or "")


def test_a_second_launcher_refuses(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"lease_seconds": 30, "renewal_seconds": 0.2}

    def sleep(_seconds: float) -> None:
        before = (tmp_path / "lease").read_bytes()
        wait_until(lambda: (tmp_path / "lease").read_bytes() != before)

    monkeypatch.setattr(clock, "sleep", sleep)
    with (
        held(tmp_path, **times),
        pytest.raises(LaunchError, match=r"another launcher \(.+\) follows the run in"),
        held(tmp_path, **times),
    ):
        pass


def test_a_lease_that_is_abandoned_stays_to_lapse(tmp_path: Path, clock: Clock) -> None:
    watch = LeaseWatch(tmp_path)
    with pytest.raises(RuntimeError), held(tmp_path, **QUICK) as let_lapse:
        watch.lapsed()
        let_lapse()
        raise RuntimeError
    assert lapses_within(watch, 1.5, clock)


def test_a_launcher_that_stood_still_leaves_the_lease_of_its_successor_alone(tmp_path: Path) -> None:
    with held(tmp_path, **QUICK):
        while renews():  # a renewal in progress overwrites ours
            write(tmp_path, time.time())
            left = (tmp_path / "lease").read_bytes()
            time.sleep(0.5)
    assert (tmp_path / "lease").read_bytes() == left


def test_the_lease_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path):
        raise RuntimeError
    assert not (tmp_path / "lease").exists()

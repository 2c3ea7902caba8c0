"""The launcher's lease, as the trainer reads it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from components.launch import LaunchError
from components.launch.lease import held
from trainer.limits import lease_expires, passed


def test_a_held_lease_is_renewed_and_given_back(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    with held(run, lease_seconds=1.0, renewal_seconds=0.1):
        first = lease_expires(run)
        time.sleep(1.3)
        assert passed(run) is None, "renewed before it lapsed"
        assert lease_expires(run) > first
    assert lease_expires(run) is None
    assert passed(run) is None, "a run that nobody launched any more has no limit"


def test_a_dead_launchers_lease_is_taken_over_before_it_lapses(tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    expires = time.time() + 3  # as if renewed just now: its holder is given the time of two and a half renewals
    lease.write_text(json.dumps({"expires": expires, "holder": "gone"}))
    begun = time.monotonic()
    with held(tmp_path, lease_seconds=3, renewal_seconds=0.4):
        assert 0.9 < time.monotonic() - begun < 2
        assert time.time() < expires, "the run would have ended itself"
        assert json.loads(lease.read_text())["holder"] != "gone"


def test_a_lapsed_lease_ends_the_run_and_is_taken_over_at_once(tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    lease.write_text(json.dumps({"expires": time.time() - 3, "holder": "gone"}))
    assert "lease lapsed" in str(passed(tmp_path))
    with held(tmp_path):
        assert passed(tmp_path) is None


def test_a_second_launcher_refuses(tmp_path: Path) -> None:
    times = {"lease_seconds": 30, "renewal_seconds": 0.2}
    with (
        held(tmp_path, **times),
        pytest.raises(LaunchError, match=r"another launcher \(.+\) follows the run in"),
        held(tmp_path, **times),
    ):
        pass


def test_a_lease_that_is_abandoned_stays_to_lapse(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path, lease_seconds=1.0, renewal_seconds=0.1) as let_lapse:
        let_lapse()
        raise RuntimeError
    assert passed(tmp_path) is None
    time.sleep(1.2)
    assert "lease lapsed" in str(passed(tmp_path))


def test_the_lease_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), held(tmp_path):
        raise RuntimeError
    assert not (tmp_path / "lease").exists()

"""Names of a rank's failures: codes of exceptions and signals, which failure caused the others, the watchdog."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import micro
import pytest

from trainer.errors import DivergedError
from trainer.exitcodes import MEANING, ExitCode, of_process, retryable
from trainer.process import failures
from trainer.process.failures import Failure, classify, root_cause
from trainer.recording import logs


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DivergedError("diverged"), 70),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711"), 160),
        (RuntimeError("Timed out waiting 60000ms for recv operation to complete"), 160),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 162),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 7"), 3),
        (MemoryError(), 137),
        (KeyError("x"), 3),
    ],
)
def test_exceptions_have_exit_codes(error: Exception, code: int):
    assert classify(error)[0] == code


def test_lost_communication_is_one_line_and_the_log_has_the_traceback(tmp_path: Path, capsys):
    place, said = (
        "/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547",
        "Connection closed by peer [10.0.0.2]:4711",
    )
    logs.setup(tmp_path, 1)
    try:
        raise RuntimeError(f"[{place}] {said}. This means that the peer has gone\nGLHF! 🏖️")
    except RuntimeError as error:
        code, reason = classify(error)
        failures.show(error, code, reason)
        logs.note(reason, error)
    finally:
        for handler in logging.getLogger("trainer").handlers:
            handler.close()
        logging.getLogger("trainer").handlers = []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error 160 ") and f": RuntimeError: {said}" in line and line.endswith(failures.PEER_GONE)
    assert "pair.cc" not in line and "GLHF" not in line
    log = (tmp_path / "logs" / "rank-1.log").read_text()
    assert "Traceback (most recent call last)" in log and place in log


def test_process_return_codes():
    assert [of_process(code) for code in (0, 65, -9, -11, -6, -15)] == [0, 65, 137, 139, 139, 143]
    assert [code for code in MEANING if retryable(code)] == [130, 137, 139, 143, 160, 161, 162]


def test_permanent_failure_explains_the_others():
    echo, hang, bad = Failure(0, 160, "peer gone", 1.0), Failure(1, 161, "hang", 3.0), Failure(2, 65, "shard", 4.0)
    stopped = Failure(3, 143, "terminated", 0.5)
    assert root_cause([stopped, echo, hang, bad]) is bad
    assert root_cause([stopped, echo, hang]) is hang
    assert root_cause([stopped, echo]) is echo


def test_watchdog_says_where_it_hangs_and_ends_with_161(tmp_path: Path):
    program = (
        "import time\nfrom trainer.process.watchdog import Watchdog\n"
        "def stuck():\n    time.sleep(600)\n"
        "with Watchdog(2) as dog:\n    dog.beat()\n    stuck()\n"
    )
    environment = micro.environment(YAONGI_FAILURES=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == ExitCode.HANG
    assert "in stuck" in done.stderr
    (failure,) = failures.recorded(tmp_path)
    assert failure.code == ExitCode.HANG and "hang_timeout_seconds" in failure.reason


@pytest.mark.parametrize(
    ("rank", "code", "age", "expected"),
    [(1, 65, 30.0, 160), (0, 65, 30.0, 161), (1, 143, 30.0, 161), (1, 65, -3600.0, 161)],
    ids=["peer", "own record", "stopped peer", "peer that fails later"],
)
def test_rank_that_waits_for_a_failed_peer_ends_with_160(
    tmp_path: Path, rank: int, code: int, age: float, expected: int
):
    failure = Failure(rank, code, "shard x.bin is missing", time.time() - age)
    (tmp_path / f"rank-{rank}.json").write_text(json.dumps(vars(failure)))
    program = (
        "import time\nfrom trainer.process import watchdog\nwatchdog.PEER_SECONDS = 0.5\n"
        "with watchdog.Watchdog(2) as dog:\n    dog.beat()\n    time.sleep(600)\n"
    )
    environment = micro.environment(YAONGI_FAILURES=str(tmp_path), RANK="0")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == expected
    if expected == 160:
        assert "rank 1 has failed, so this rank stops waiting for it: shard x.bin is missing" in done.stderr
        assert failures.root_cause(failures.recorded(tmp_path)).code == 65

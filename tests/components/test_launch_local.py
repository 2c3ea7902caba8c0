"""The local launcher with a fake entrypoint of the trainer, found first because it is in the current folder."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from components.launch import local
from trainer import exitcodes
from trainer.errors import LaunchError
from trainer.process import launcher

STAND_IN = """
import json, os, signal, sys, time
behaviour = open(sys.argv[3]).read().strip()
if behaviour == "wait":
    def save(number, frame):
        try:  # not print: a signal that meets one would enter it a second time
            os.write(1, b"saved after signal %d\\n" % number)
        except OSError:
            pass  # else it would come out of the print that the signal met, and be passed over there
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    print("ready", os.getpid(), os.getsid(0), flush=True)
    while True:
        time.sleep(0.05)
        if os.path.exists("chatter"):
            try:
                print("step", flush=True)
            except OSError:
                pass  # as the trainer's logging does
print(*sys.argv[1:], os.environ["PET_NNODES"], os.environ["PET_NPROC_PER_NODE"], os.environ["OMP_NUM_THREADS"])
code, _, reason = behaviour.partition(" ")
if reason:
    print(f"error {code} (training diverged): {reason}", file=sys.stderr)
    with open(os.environ["YAONGI_TERMINATION_LOG"], "w") as file:
        json.dump({"reason": reason}, file)
sys.exit(int(code))
"""


@pytest.fixture
def spec_file(tmp_path, monkeypatch):
    (tmp_path / "trainer").mkdir()
    real = Path(exitcodes.__file__).parent
    beside = f"__path__.append({str(real)!r})\n"
    (tmp_path / "trainer" / "__init__.py").write_text((real / "__init__.py").read_text() + beside)
    (tmp_path / "trainer" / "entrypoint.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "train.yaml"


def test_the_trainer_is_started_on_the_spec_with_as_many_processes_as_ranks(spec_file, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    spec_file.write_text("0")
    local.run_entrypoint("train", "train.yaml", 2, ["steps=4"])
    assert capsys.readouterr().out == "train --spec train.yaml --set steps=4 1 2 3\n"


def test_cores_are_shared_out_between_ranks(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [local.environment(ranks)["OMP_NUM_THREADS"] for ranks in (1, 2, 3, 16)] == ["8", "4", "2", "1"]


def test_a_failure_is_one_line_with_the_codes_meaning_and_the_trainers_reason(spec_file, capsys):
    spec_file.write_text("70 loss is not finite at step 12; lower the learning rate")
    with pytest.raises(LaunchError) as error:
        local.run_entrypoint("train", "train.yaml", 1)
    assert str(error.value) == (
        "train ended with exit code 70 (training diverged): loss is not finite at step 12; lower the learning rate"
    )
    assert error.value.code == 70
    assert "loss is not finite" not in capsys.readouterr().out, "the reason is said once"


def test_the_real_entrypoint_refuses_a_bad_spec(tmp_path):
    (tmp_path / "train.yaml").write_text("stepz: 3")
    with pytest.raises(LaunchError, match=r"(?s)exit code 2 \(bad spec\): .*stepz: unknown field; did you mean"):
        local.run_entrypoint("train", str(tmp_path / "train.yaml"), 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_trainer_which_saves_before_the_launcher_ends(spec_file, number, code):
    spec_file.write_text("wait")
    launcher = """
        import sys
        from components.launch import local
        from trainer.errors import LaunchError
        try:
            local.run_entrypoint("train", "train.yaml", 1)
        except LaunchError as error:
            print(error, flush=True)
            sys.exit(error.code)
    """
    command = [sys.executable, "-c", textwrap.dedent(launcher)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        _, pid, session = process.stdout.readline().split()
        assert pid == session, "the trainer has a session of its own"
        process.send_signal(number)
        output, _ = process.communicate(timeout=280)
    assert process.returncode == code
    assert f"saved after signal {int(number)}" in output
    assert "train was stopped" in output and "run the same command again" in output
    assert ends(pid)


def test_the_trainer_ends_when_nobody_reads_its_launcher_any_more(spec_file):
    spec_file.write_text("wait")
    launcher = "from components.launch import local; local.run_entrypoint('train', 'train.yaml', 1)"
    with subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        pid = process.stdout.readline().split()[1]
        process.stdout.close()
        (spec_file.parent / "chatter").touch()
        assert process.wait(timeout=280) != 0
    assert ends(pid)


def ends(pid: str) -> bool:
    """Whether the process ends within a minute."""
    for _ in range(1200):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # its new parent has not waited for it yet
            return True
        time.sleep(0.05)
    return False


def test_a_stop_is_repeated_by_people_only(monkeypatch):
    """A second signal costs the checkpoint, so signals that several processes send for one reason count once."""
    sent: list[int] = []
    child = type("Child", (), {"send_signal": staticmethod(sent.append)})
    with subprocess.Popen(["sleep", "600"]) as launching:
        monkeypatch.setenv(launcher.VARIABLE, str(launching.pid))
        with local._forwarding_to(child) as passed_on:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert sent == passed_on == [signal.SIGINT, signal.SIGTERM]
        sent.clear()
        with local._forwarding_to(child):
            launching.kill()
            launching.wait()
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert sent == [signal.SIGTERM]

"""run_all.sh: from a clone to a finished run with one command, and what it says where that cannot work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECRET = "hf_never-shown"  # not a key
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$RECORD.args"
env -0 >"$RECORD.env"
trap 'echo saving; sleep 0.3; echo saved; exit 143' TERM
[ -z "${WAITS:-}" ] || { echo waits; while :; do sleep 0.05; done; }
echo said; echo complained >&2
exit "${CODE:-0}"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the script needs of a clone, with an environment in which `yaongi` is a recorder."""
    folder = tmp_path / "clone"
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("run_all.sh", "Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (programs / "python").symlink_to(sys.executable)
    (programs / "yaongi").write_text(FAKE)
    (programs / "yaongi").chmod(0o755)
    (folder / ".venv" / ".ready").touch()  # newer than the lock: `make setup` has nothing to do
    (tmp_path / "uv").write_text("#!/bin/sh\n[ $1 = --version ] || { echo installs; exit 9; }\necho uv 0\n")
    (tmp_path / "uv").chmod(0o755)
    return folder


def environment(clone: Path, **more: str) -> dict[str, str]:
    path = f"{clone.parent}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(clone.parent), "RECORD": str(clone.parent / "record"), **more}


def call(clone: Path, *arguments: str, user: int | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """The script, from another folder; standard output and errors together."""
    command = [clone / "run_all.sh", *arguments]
    return subprocess.run(
        command,
        env=environment(clone, **more),
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        user=user,
    )


def handed_on(clone: Path) -> dict[str, str]:
    """The environment of `yaongi run`."""
    text = (clone.parent / "record.env").read_text()
    return dict(entry.split("=", 1) for entry in text.split("\0") if entry)


def arguments(clone: Path) -> list[str]:
    return (clone.parent / "record.args").read_text().splitlines()


def test_the_default_is_the_recommended_preset_and_the_folder_beside_the_script(clone: Path) -> None:
    done = call(clone)
    assert done.returncode == 0, done.stdout
    assert arguments(clone) == ["run", "h100-4b-interleaved", "--workdir", f"{clone}/work"]
    assert "installs" not in done.stdout


def test_job_options_and_exit_code_are_passed_on(clone: Path) -> None:
    done = call(clone, "my job.yaml", "--set", "train.steps=2", f"--workdir={clone}/elsewhere", CODE="65")
    assert done.returncode == 65
    assert arguments(clone) == ["run", "my job.yaml", "--set", "train.steps=2", f"--workdir={clone}/elsewhere"]
    assert (clone / "elsewhere.log").exists() and not (clone / "work.log").exists()
    call(clone, "--set", "train.steps=3")
    assert arguments(clone)[:2] == ["run", "h100-4b-interleaved"]


def test_the_log_has_all_that_was_printed_by_all_calls(clone: Path) -> None:
    first, second = call(clone, "tiny"), call(clone, "tiny", CODE="2")
    assert (clone / "work.log").read_text() == first.stdout + second.stdout
    assert "said\n" in first.stdout and "complained\n" in first.stdout
    assert second.stdout.endswith("yaongi run ended with exit code 2\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_reaches_the_run_which_has_time_to_save(clone: Path, number: signal.Signals) -> None:
    log = clone / "work.log"
    process = subprocess.Popen(
        [clone / "run_all.sh", "tiny"],
        env=environment(clone, WAITS="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup a shell could not trap it
    )
    deadline = time.monotonic() + 30
    while not (log.exists() and "waits" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGINT:  # the recorder saves at SIGTERM alone; an interrupted one just ends
        os.killpg(process.pid, number)  # as a terminal does
        assert process.wait(30) == 130
        return
    process.send_signal(number)
    assert process.wait(30) == 143
    assert "saving\nsaved\n" in log.read_text()


@pytest.mark.parametrize(
    "text",
    [
        f"HF_TOKEN={SECRET}",
        f"\ufeff# keys\r\n\r\nHF_TOKEN={SECRET}\r\n",
        f"  export   HF_TOKEN='{SECRET}'",
        f'HF_TOKEN="{SECRET}"  # mine\r\nEMPTY=\r\n',
        f"HF_TOKEN={SECRET} # mine\nOTHER='a b # c'\n",
    ],
    ids=["plain", "windows", "export", "quotes", "comments"],
)
def test_keys_come_from_the_file_and_are_never_shown(clone: Path, text: str) -> None:
    (clone / ".env").write_bytes(text.encode())
    done = call(clone, "tiny")
    assert done.returncode == 0, done.stdout
    found = handed_on(clone)
    assert found["HF_TOKEN"] == SECRET and "EMPTY" not in found
    assert found.get("OTHER", "a b # c") == "a b # c"
    assert SECRET not in done.stdout + (clone / "work.log").read_text() + str(arguments(clone))


def test_what_the_environment_has_takes_precedence(clone: Path) -> None:
    (clone / ".env").write_text("HF_TOKEN=file\nAWS_ACCESS_KEY_ID=file\n")
    call(clone, "tiny", HF_TOKEN="environment")
    assert (handed_on(clone)["HF_TOKEN"], handed_on(clone)["AWS_ACCESS_KEY_ID"]) == ("environment", "file")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (SECRET, "no NAME= at its beginning"),
        (f"HF TOKEN={SECRET}", "no NAME= at its beginning"),
        (f"HF_TOKEN='{SECRET}", "its quotes do not enclose the value"),
        (f'HF_TOKEN="{SECRET}"x', "its quotes do not enclose the value"),
        (f"HF_TOKEN={SECRET} more", "a space in the value"),
        (f"UID={SECRET}", "a shell does not let UID be set"),
    ],
)
def test_a_malformed_line_is_named_by_its_number_alone(clone: Path, line: str, said: str) -> None:
    (clone / ".env").write_text(f"# keys\n\n{line}\n")
    done = call(clone, "tiny")
    assert done.returncode == 2
    assert done.stdout.startswith(f"error: {clone}/.env line 3: {said}; ") and done.stdout.count("\n") == 1
    assert SECRET not in done.stdout and not (clone.parent / "record.args").exists()


def test_the_example_is_a_file_that_sets_nothing(clone: Path) -> None:
    shutil.copy(ROOT / ".env.example", clone / ".env")
    assert call(clone, "tiny").returncode == 0
    assert "HF_TOKEN" in (clone / ".env").read_text() and "HF_TOKEN" not in handed_on(clone)


def test_git_and_docker_ignore_the_keys() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "**/.env" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.fixture
def foreign() -> Iterator[tuple[Path, int | None]]:
    """A folder in which the script may not write, and the user as whom it runs (root may write everywhere)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "clone"
        folder.mkdir()
        shutil.copy(ROOT / "run_all.sh", folder)
        for path in (Path(name), folder):
            path.chmod(0o755 if os.geteuid() == 0 else 0o555)
        yield folder, 65534 if os.geteuid() == 0 else None
        Path(name).chmod(0o755)
        folder.chmod(0o755)


def test_a_clone_that_cannot_be_written_is_said_in_one_line(foreign: tuple[Path, int | None]) -> None:
    folder, user = foreign
    done = call(folder, "tiny", user=user)
    assert done.returncode == 74
    assert done.stdout.startswith(f"error: {folder} cannot be written by user ") and done.stdout.count("\n") == 1
    assert "clone into a folder of your own" in done.stdout


def test_a_work_folder_that_cannot_be_made_is_said_in_one_line(clone: Path) -> None:
    done = call(clone, "tiny", "--workdir", "/proc/none/work")
    assert (done.returncode, done.stdout.count("\n")) == (74, 1)
    assert done.stdout.startswith("error: /proc/none cannot be written") and "--workdir FOLDER" in done.stdout


@pytest.mark.parametrize("program", ["python3", "make"])
def test_an_absent_program_is_said_in_one_line(clone: Path, program: str) -> None:
    shutil.rmtree(clone / ".venv")
    programs = clone.parent / "programs"
    programs.mkdir()
    for name in {"bash", "dirname", "mkdir", "id", "make", "python3"} - {program}:
        (programs / name).symlink_to(sys.executable if name == "python3" else shutil.which(name) or "")
    done = call(clone, "tiny", PATH=str(programs))
    assert (done.returncode, done.stdout.count("\n")) == (69, 1), done.stdout
    assert program in done.stdout and "apt install" in done.stdout


def test_a_failed_installation_can_be_repeated(clone: Path) -> None:
    (clone / ".venv" / ".ready").unlink()  # the `uv` of this test refuses to install
    done = call(clone, "tiny")
    assert done.returncode == 69 and not (clone.parent / "record.args").exists()
    assert "installs\n" in done.stdout and f"call {clone}/run_all.sh again" in done.stdout.splitlines()[-1]


@pytest.fixture
def real(clone: Path) -> Path:
    """The clone with this environment's `yaongi`."""
    programs = clone / ".venv" / "bin"
    shutil.rmtree(programs)
    programs.symlink_to(Path(sys.executable).parent)
    return clone


def test_without_a_gpu_the_large_model_is_refused_in_one_line(real: Path) -> None:
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU, which would train")
    done = call(real, PYTHONPATH=str(ROOT))
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1, done.stdout
    assert "without a GPU; use a GPU or a cluster" in errors[0]


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_a_finished_one_has_nothing_to_do(real: Path) -> None:
    """The script to the letter: keys, installation (present), run, SIGTERM in the training, two more calls."""
    (real / ".env").write_bytes(f"\ufeffHF_TOKEN='{SECRET}'\r\n".encode())
    command, log = [real / "run_all.sh", "tiny", "--set", "train.steps=6"], real / "work.log"
    started = subprocess.Popen(command, env=environment(real, PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (log.exists() and "▶ train" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    started.send_signal(signal.SIGTERM)
    assert started.wait(120) == 143, log.read_text()
    second = call(real, *command[1:], PYTHONPATH=str(ROOT))
    assert second.returncode == 0 and "6 steps" in second.stdout, second.stdout
    (report,) = (real / "work" / "checkpoints" / "runs").glob("*/report.html")
    before = report.stat().st_mtime_ns
    third = call(real, *command[1:], PYTHONPATH=str(ROOT))
    assert third.returncode == 0 and report.stat().st_mtime_ns >= before
    files = [path for path in real.rglob("*") if path.is_file() and ".venv" not in path.parts and path.name != ".env"]
    assert len(files) > 20 and [path for path in files if SECRET.encode() in path.read_bytes()] == []

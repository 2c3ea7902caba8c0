"""The entrypoint: from the ends of real child processes to exit codes, restarts and a termination message."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import micro
import pytest
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from waiting import wait_until

from trainer import distributed, entrypoint, preflight
from trainer.errors import ForeseenError
from trainer.exitcodes import MEANING, ExitCode
from trainer.process import failures, hostmemory, launcher, limits, restarts
from trainer.process.restarts import NodeRecord
from trainer.spec import TrainSpec

SOON_SECONDS = 60  # until a rank that was asked to end has ended; one that did not listen would be killed later
# A rank that does what its local environment says, and needs no torch to do so.
RANK = """
import json, os, signal, sys, time
rank, directory = int(os.environ.get("RANK", 0)), os.environ["YAONGI_FAILURES"]
def fail(code, reason):
    record = {"rank": rank, "code": code, "reason": reason, "time": time.time()}
    open(f"{directory}/rank-{rank}.json", "w").write(json.dumps(record))
    os._exit(code)
def wait():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    open(os.environ["STARTED"] + str(rank), "w").close()
    time.sleep(600)
def after(file):
    # Goes on when the other rank has made the file, whatever torchrun sends in between.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(os.environ["STARTED"] + str(rank), "w").close()
    while not os.path.exists(file):
        time.sleep(0.01)
"""


@pytest.fixture
def shim(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[int, dict]]]:
    """Runs the entrypoint in this process with children that run `body`; returns exit code and termination message."""
    for name in list(os.environ):
        if name.startswith(("PET_", "YAONGI", "OMP_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(2 * SOON_SECONDS))
    monkeypatch.setenv("STARTED", str(tmp_path / "started-"))
    message = tmp_path / "termination-log"
    message.touch()
    monkeypatch.setenv(entrypoint.TERMINATION_LOG_VARIABLE, str(message))
    # For a name in events that nobody records, torchrun reads the sources of the whole stack: under pytest, half of a
    # test's processor time.
    monkeypatch.setattr(dynamic_rendezvous, "get_method_name", lambda depth=2: "")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    quits = signal.getsignal(signal.SIGQUIT)

    def run(body: str, *, task: str = "train", ranks: int = 1, **changes) -> tuple[int, dict]:
        program = tmp_path / "rank.py"
        program.write_text(RANK + body)
        monkeypatch.setattr(entrypoint, "RANK_PROGRAM", (str(program),))
        monkeypatch.setenv("PET_NPROC_PER_NODE", str(ranks))
        spec = micro.micro_spec(micro_data, tmp_path / "run", **changes)
        file = micro.write_spec(spec, tmp_path / "spec.yaml")
        code = entrypoint.main([task, "--spec", str(file)])
        return code, json.loads(message.read_text())

    yield run
    for number, handler in {**handlers, signal.SIGQUIT: quits}.items():
        signal.signal(number, handler)
    # What the entrypoint and torchrun set for their children.
    of_children = (failures.DIRECTORY_VARIABLE, preflight.VARIABLE, launcher.VARIABLE)
    for name in (*of_children, "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        os.environ.pop(name, None)
    logging.getLogger("trainer").handlers = []


CASES = {
    "success": ("pass", 0),
    "bad data": ("fail(65, 'shard x.bin is missing')", 65),
    "unexpected": ("sys.exit(1)", 1),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", 137),
    "segmentation fault": ("os.kill(os.getpid(), signal.SIGSEGV)", 139),
    "abort": ("os.abort()", 139),
    "communication": ("fail(160, 'connection closed by peer')", 160),
    "hang": ("fail(161, 'no step finished')", 161),
    "gpu": ("fail(162, 'CUDA error')", 162),
    "stopped elsewhere": ("os._exit(143)", 143),
    # One rank fails and the other only notices it, in either order.
    "peer killed": ("wait() if rank else os.kill(os.getpid(), signal.SIGKILL)", 137),
    "peer has bad data": (
        "(after(directory + '/rank-0.json'), fail(160, 'peer gone')) if rank else fail(65, 'bad shard')",
        65,
    ),
    "echo comes first": (
        "(after(os.environ['STARTED'] + '0'), fail(160, 'peer gone'))"
        " if rank else (after(directory + '/rank-1.json'), time.sleep(.05), fail(70, 'diverged'))",
        70,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ends_of_ranks_become_exit_codes(shim, case: str):
    body, expected = CASES[case]
    code, message = shim(body, ranks=2 if "rank" in body else 1)
    assert code == expected
    assert message["code"] == expected and message["retryable"] == (expected >= 128)
    assert message["meaning"] == MEANING[ExitCode(expected)]
    if "fail(65" in body:
        assert "shard" in message["reason"]


def test_the_agent_reports_a_failed_rank_only_when_asked_for_all(
    shim, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def of_the_agent() -> list[str]:
        found = [each.name for each in caplog.records if each.name.startswith("torch.distributed.elastic")]
        caplog.clear()
        return found

    assert shim("fail(65, 'bad shard')")[0] == 65 and not of_the_agent()
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
        logging.getLogger(name).manager._clear_cache()
    monkeypatch.setenv("YAONGI_VERBOSE", "1")
    assert shim("fail(65, 'bad shard')")[0] == 65 and of_the_agent()


def test_single_process_task(shim):
    code, message = shim("fail(66, 'step-00000004 is damaged') if sys.argv[1] == 'evaluate' else 0", task="evaluate")
    assert (code, message["reason"]) == (66, "rank 0: step-00000004 is damaged")
    assert shim("assert sys.argv[1] == 'export'", task="export")[0] == 0


def stop_when_started(tmp_path: Path, number: int) -> None:
    def stop() -> None:
        while len(list(tmp_path.glob("started-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_signal_reaches_the_ranks(shim, tmp_path: Path, number: int, expected: int):
    stop_when_started(tmp_path, number)
    began = time.monotonic()
    code, message = shim("signal.signal(signal.SIGINT, lambda *_: os._exit(130)); wait()", ranks=2)
    assert code == expected and "no checkpoint yet" in message["reason"]
    assert time.monotonic() - began < SOON_SECONDS


def test_a_second_stop_signal_ends_ranks_that_do_not_end(shim, tmp_path: Path):
    def stop_twice() -> None:
        wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_twice, daemon=True).start()
    body = f"""
import pathlib
asked = pathlib.Path({str(tmp_path)!r}, f"asked-{{rank}}")
asked.with_name(f"pid-{{rank}}").write_text(str(os.getpid()))
signal.signal(signal.SIGTERM, lambda *_: asked.touch())
open(os.environ["STARTED"] + str(rank), "w").close()
while True:
    time.sleep(0.05)
"""
    code, _ = shim(body, ranks=2)
    assert code == ExitCode.TERMINATED
    wait_until(lambda: not any(is_running(int(file.read_text())) for file in tmp_path.glob("pid-*")))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("descriptors", [True, False], ids=["by descriptor", "by number"])
def test_a_launcher_that_is_killed_ends_the_run_with_75(shim, tmp_path: Path, monkeypatch, descriptors: bool):
    if not descriptors:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    with subprocess.Popen(["sleep", "600"]) as launching:
        monkeypatch.setenv(launcher.VARIABLE, str(launching.pid))

        def kill() -> None:
            wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 2)
            launching.kill()
            launching.wait()

        threading.Thread(target=kill, daemon=True).start()
        code, message = shim("wait()", ranks=2)
    assert code == ExitCode.LIMIT and f"launched this run ({launching.pid}) is gone" in message["reason"]
    monkeypatch.setenv(launcher.VARIABLE, str(launching.pid))
    assert shim("pass")[0] == ExitCode.LIMIT, "one that has been gone before starts nothing"


def test_a_run_that_is_being_trained_is_refused_before_anything_starts(shim, tmp_path: Path):
    program = (
        "import sys; from trainer.process import exclusive\nwith exclusive.held(sys.argv[1]): print(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        env=micro.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        code, message = shim("open(os.environ['STARTED'], 'w')")
        assert code == ExitCode.UNAVAILABLE and f"is being trained by process {holder.pid} on " in message["reason"]
        assert not list(tmp_path.glob("started-*")) and not (tmp_path / "run" / "restarts.json").exists()
        assert shim("pass", task="evaluate")[0] == 0, "who only reads is welcome"
        holder.kill()
    assert shim("pass")[0] == 0


def test_code_and_reason_come_out_whatever_happens_at_the_end(
    shim, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A full disk and a late stop signal, both after the run has found bad data."""

    def end_on_full_disk(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(restarts, "end", end_on_full_disk)
    code, message = shim("fail(65, 'shard x.bin is missing')")
    assert (code, message["reason"]) == (65, "rank 0: shard x.bin is missing")
    assert "exit 65" in capsys.readouterr().err


def test_deadline_and_lease_end_a_run_with_75(shim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    began = time.monotonic()
    code, message = shim("wait()", runtime={"deadline_seconds": 1})
    assert code == 75 and "deadline" in message["reason"] and time.monotonic() - began < SOON_SECONDS
    # Lapses after 2.5 renewals: the rank listens by then, even on a busy machine.
    lease = limits.Lease("gone", time.time(), renewal_seconds=4.0, lapses_after_seconds=30.0)
    (tmp_path / "run" / limits.LEASE).write_text(json.dumps(asdict(lease)))
    told = tmp_path / "told"
    code, message = shim(f"""
def stop(*_):
    open({str(told)!r}, "w").write(open(f"{{directory}}/limit").read())
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
time.sleep(600)
""")
    assert code == 75 and "lease" in message["reason"]
    assert told.read_text() == message["reason"], "the rank knows that it is no ordinary stop"
    (tmp_path / "run" / limits.LEASE).write_text(json.dumps(asdict(replace(lease, renewed=time.time() - 3600))))
    code, message = shim("sys.exit(1)")
    assert code == 75, "a lease that lapsed long ago starts nothing"
    monkeypatch.setenv(limits.UNWATCHED_VARIABLE, "1")
    code, message = shim("sys.exit(0)")
    assert code == 0, "the pods of a run that was resumed without a launcher are told so"


def test_budget_is_for_restarts_without_progress(shim, tmp_path: Path):
    runtime = {"max_restarts": 2}
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    assert [shim(killed, runtime=runtime)[0] for _ in range(3)] == [137, 137, 137]
    latest = tmp_path / "run" / "checkpoints" / "LATEST"
    latest.parent.mkdir(parents=True)
    latest.write_text("step-00000004\n")
    assert [shim(killed, runtime=runtime)[0] for _ in range(3)] == [137, 137, 137], "progress gives a new budget"
    code, message = shim(killed, runtime=runtime)
    assert code == 71 and "step 4" in message["reason"] and "6× killed" in message["reason"]
    assert shim("pass", runtime=runtime)[0] == 0, "a start after a permanent end is a person's decision"
    assert restarts.summary(tmp_path / "run") == {"killed": 6} and restarts.count(tmp_path / "run") == 6


def test_a_run_that_was_made_longer_gets_further_below_its_former_end(tmp_path: Path):
    for saved in (120, 120, 90, 90, 100):  # its checkpoint of step 120 goes with the first one of the longer run
        assert restarts.begin(tmp_path, 1, saved, node="a").without_progress <= 1


def test_killed_entrypoint_and_stop_signals_in_the_books(tmp_path: Path):
    restarts.begin(tmp_path, 1, 0, node="a")
    restarts.begin(tmp_path, 1, 0, node="a")  # the first start never said how it ended
    assert restarts.summary(tmp_path) == {"killed": 1}
    for _ in range(5):
        restarts.end(tmp_path, ExitCode.TERMINATED, node="a")
        restarts.begin(tmp_path, 1, 0, node="a")
    restarts.begin(tmp_path, 1, 0, node="b")
    restarts.begin(tmp_path, 1, 0, "evaluate", node="b")
    restarts.end(tmp_path, ExitCode.COMMUNICATION, node="b")
    restarts.begin(tmp_path, 1, 0, node="b")
    assert restarts.summary(tmp_path) == {"killed": 1, "terminated": 5}, "what a lost node costs the others is no cause"
    assert restarts.count(tmp_path) == 6
    for node in ("a", "b"):
        restarts.end(tmp_path, ExitCode.HANG, node=node)
        restarts.begin(tmp_path, 3, 0, node=node)
    assert restarts.summary(tmp_path) == {"killed": 1, "terminated": 5, "hang": 1}
    with pytest.raises(ForeseenError, match="restarted 1 times at step 0") as error:
        restarts.begin(tmp_path, 1, 0, node="a")
    assert error.value.code == ExitCode.BUDGET


def memory_group(bytes_allowed: int) -> tuple[Path, Path] | None:
    """A control group with a memory limit (v2, else v1): its directory and the file where the kernel counts kills."""
    for parent, limit, counter in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.events"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.oom_control"),
    ):
        group = parent / f"yaongi-test-{os.getpid()}"
        try:
            group.mkdir()
            # The kernel fills the directory; where it does not, this is no hierarchy with a memory controller.
            with (group / limit).open("r+") as stream:
                stream.write(str(bytes_allowed))
            return group, group / counter
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


def test_want_of_memory_is_told_from_other_kills(shim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = memory_group(100 * 2**20)
    if found is None:
        pytest.skip("needs the right to make a control group")
    group, counter = found
    monkeypatch.setattr(hostmemory, "KILL_FILES", (counter,))
    try:
        code, message = shim(f"open('{group}/cgroup.procs', 'w').write(str(os.getpid())); bytearray(300 * 2**20)")
        assert code == ExitCode.KILLED and "out of memory; lower train.batch.micro_batch_rows" in message["reason"]
        assert shim("os.kill(os.getpid(), signal.SIGKILL)")[0] == ExitCode.KILLED
        assert shim("pass")[0] == 0
    finally:
        group.rmdir()
    assert restarts.summary(tmp_path / "run") == {"out_of_memory": 1, "killed": 1}


@pytest.mark.parametrize(
    "text", ["[]", "", "null", '{"nodes": 3}', '{"nodes": {"a": []}}', '{"nodes": {"a": {"total": "many"}}}']
)
def test_damaged_books_cost_no_more_than_the_count(tmp_path: Path, text: str):
    (tmp_path / "restarts.json").write_text(text)
    assert restarts.summary(tmp_path) == {}
    assert restarts.begin(tmp_path, 1, 0, node="a").total == 0
    restarts.end(tmp_path, ExitCode.KILLED, node="a")
    assert restarts.begin(tmp_path, 1, 0, node="a").reasons == {"killed": 1}


ANEW = [(143, True), (130, True), (75, True), (0, True), (137, False), (None, False)]


@pytest.mark.parametrize(("code", "anew"), ANEW)
def test_deadline_of_a_start_after_a_stop_counts_from_that_start(tmp_path: Path, code: int | None, anew: bool):
    long_ago = time.time() - 15 * 86400
    before = vars(NodeRecord(first_start=long_ago, without_progress=1, exit_code=code))
    del before["begun"]  # as version 0.1 wrote it
    (tmp_path / "restarts.json").write_text(json.dumps({"nodes": {"a": before}}))
    record = restarts.begin(tmp_path, 5, 0, node="a")
    assert (record.first_start > long_ago + 86400) == anew
    assert restarts.begun(tmp_path) == record.begun == long_ago, "the run's own start stays"
    if code in (143, 130):
        assert record.without_progress == 1, "the budget stays what it was"


def test_directory_that_cannot_be_made_is_one_line(micro_data: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    file = micro.write_spec(micro.micro_spec(micro_data, tmp_path / "file" / "run"), tmp_path / "spec.yaml")
    command = [sys.executable, "-m", "trainer.entrypoint", "--spec", str(file)]
    done = subprocess.run(command, env=micro.environment(), capture_output=True, text=True)
    assert done.returncode == 74 and "Traceback" not in done.stderr
    assert f"{tmp_path / 'file' / 'run'}: Not a directory; fix the volume" in done.stderr


def test_bad_spec_ends_with_2_before_anything_starts(tmp_path: Path, micro_data: Path):
    file = micro.write_spec(micro.micro_spec(micro_data, tmp_path / "run"), tmp_path / "spec.yaml")
    command = [sys.executable, "-m", "trainer.entrypoint", "--spec", str(file), "--set", "runtime.max_restart=3"]
    done = subprocess.run(command, env=micro.environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "runtime.max_restart: unknown field; did you mean 'runtime.max_restarts'?" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_missing_shards_end_with_65_in_one_line(tmp_path: Path, micro_data: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", tokens={"shards": str(tmp_path / "nowhere")})
    process = micro.start(spec)
    code, output = micro.finish(process)
    assert code == 65 and "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("exit 65"))
    assert f"{tmp_path / 'nowhere' / 'manifest.json'}: not there; run the step" in line


def test_nodes_without_a_meeting_point_are_refused(shim, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PET_NNODES", "2:2")
    code, message = shim("pass")
    assert code == 2 and "elasticPolicy" in message["reason"]


@pytest.mark.parametrize(
    ("environment", "hosts"),
    [
        ({}, []),
        ({"PET_RDZV_ENDPOINT": "a-worker-0:23456", "PET_NNODES": "2:2"}, ["a-worker-0", "a-worker-1"]),
        ({"PET_MASTER_ADDR": "a-node-0-0.a", "PET_NNODES": "3"}, [f"a-node-0-{i}.a" for i in range(3)]),
        ({"PET_MASTER_ADDR": "worker-0-node-0-0.worker-0", "PET_NNODES": "1"}, ["worker-0-node-0-0.worker-0"]),
        # Nobody knows how many come, or what they are called.
        ({"PET_RDZV_ENDPOINT": "a-worker-0:23456", "PET_NNODES": "1:4"}, ["a-worker-0"]),
        ({"PET_MASTER_ADDR": "a-master-0", "PET_NNODES": "2"}, ["a-master-0"]),
        ({"PET_RDZV_ENDPOINT": "10.0.0.7:29400", "PET_NNODES": "2"}, ["10.0.0.7"]),
    ],
)
def test_all_workers_are_waited_for_where_their_names_can_be_told(monkeypatch, environment, hosts):
    for name in ("PET_RDZV_ENDPOINT", "PET_MASTER_ADDR", "PET_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert entrypoint.rendezvous_hosts() == hosts


def test_rendezvous_host_is_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    asked: list[float] = []

    def resolve(host: str, port: None) -> list:
        asked.append(time.monotonic())
        if len(asked) < 3:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(distributed, "_DNS_RETRY_SECONDS", (0.01, 0.02))
    with caplog.at_level("INFO"):
        distributed.wait_for_host("job-worker-0", 5)
    assert len(asked) == 3
    assert sum("job-worker-0 has no address yet" in line for line in caplog.messages) == 1, (
        "a wait of hours is not told by the second"
    )
    asked.clear()
    with pytest.raises(ForeseenError, match="job-worker-0 has no address") as error:
        distributed.wait_for_host("job-worker-0", 0.015)
    assert error.value.code == ExitCode.COMMUNICATION


def test_spec_is_one_screen_of_options(micro_data: Path, tmp_path: Path):
    spec: TrainSpec = micro.micro_spec(micro_data, tmp_path / "run")
    file = micro.write_spec(spec, tmp_path / "spec.yaml")
    changed = entrypoint.load_spec(str(file), ["steps=5", "optimizer.muon.steps=4"])
    assert (changed.steps, changed.optimizer.muon.steps) == (5, 4)

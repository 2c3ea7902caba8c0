"""First process of a training container: a thin wrapper around torchrun's agent that gives meaningful exit codes.

    python -m trainer.entrypoint [train|evaluate|export] --spec FILE [--set a.b=c]…

torchrun turns every failure into exit code 1, has no restart budget that outlives a pod, no deadline, and writes no
termination message. This wrapper adds only those: torchrun reads the place and number of processes from PET_* variables
as usual (without a rendezvous address: only this machine). Evaluation and export are one process and need no torchrun.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from trainer import preflight, thismachine
from trainer.__main__ import load_spec, parser
from trainer.checkpoints.checkpoint import latest_step, megatron_step
from trainer.errors import CommunicationError, LimitError, SpecError, VolumeError
from trainer.exitcodes import STOPS, ExitCode, of_process, retryable
from trainer.process import exclusive, failures, launcher, limits, restarts
from trainer.process.failures import Failure
from trainer.process.hostmemory import out_of_memory_kills
from trainer.process.importing import uncollected
from trainer.process.limits import Limits
from trainer.recording.trackers import aftermath
from trainer.spec import TrainSpec

log = logging.getLogger("trainer.entrypoint")

RANK_PROGRAM = ("-m", "trainer")
HOST_PATIENCE_SECONDS = 86_400.0
_FIRST_WORKER = re.compile(r"-(?:worker|node-0)-(0)(?:\.|$)")
TERMINATION_LOG_VARIABLE = "YAONGI_TERMINATION_LOG"
TERMINATION_LOG = "/dev/termination-log"
_TERMINATION_BYTES = 4096  # the limit of Kubernetes


class Signalled(BaseException):
    """A stop signal arrived; raised in the main thread at any point."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one task to its end; returns the exit code."""
    _catch_signals()  # first of all: PID 1 has no default signal actions
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options = parser("trainer.entrypoint").parse_args(arguments)
    spec: TrainSpec | None = None
    clocks: Limits | None = None
    counted, label, began = False, "", time.time()
    try:
        spec = load_spec(options.spec, options.set)
        clocks = Limits(spec.run_dir)
        if reason := clocks.passed():
            raise LimitError(reason)
        if options.task == "train" and rendezvous_host() is None:  # else an entrypoint of another node may be the one
            exclusive.refuse_second(spec.run_dir)
        try:
            record = restarts.begin(spec.run_dir, spec.runtime.max_restarts, newest_step(spec), options.task)
        except OSError as error:
            raise VolumeError(f"{spec.run_dir}: {error.strerror}; fix the volume, or the permissions on it") from error
        counted = True
        if spec.runtime.deadline_seconds is not None:
            clocks.deadline = record.first_start + spec.runtime.deadline_seconds
        if options.task == "train":
            fit_ranks(spec)
            preflight.of_node(spec)
        code, reason, label = supervise(spec, options, clocks)
    except Signalled as stop:
        _ignore_signals()
        code, reason = _stopped(spec, clocks, stop.number)
    except Exception as error:
        code, reason = failures.classify(error)
        failures.show(error, code, reason)
    _ignore_signals()  # the rest is short and must not be interrupted
    if spec is not None and counted:
        try:
            restarts.end(spec.run_dir, code, options.task, reason=label)
        except OSError as error:
            log.warning("%s: how this start ended could not be noted (%s)", spec.run_dir, error.strerror)
    write_termination_message(code, reason)
    if spec is not None and options.task == "train" and code:
        aftermath.tell(spec, code, reason, began, leads=leads())
    if code:
        with suppress(OSError):  # the reader of the output is gone
            print(f"exit {code} ({failures.meaning(code)}): {reason}", file=sys.stderr, flush=True)
    return int(code)


def supervise(spec: TrainSpec, options: Namespace, clocks: Limits) -> tuple[int, str, str]:
    """Start the processes, wait, and return how they ended: exit code, one line, restart cause ("": the code's name).

    For killed ranks, the kernel's OOM counter shows whether memory ran out.
    """
    kills_before = out_of_memory_kills()
    directory = Path(tempfile.mkdtemp(prefix="yaongi-failures-"))
    os.environ |= {failures.DIRECTORY_VARIABLE: str(directory), **launcher.named()}
    over = threading.Event()
    threading.Thread(target=_watch, args=(clocks, directory, over), name="limits", daemon=True).start()
    command = [options.task, "--spec", options.spec, *(part for each in options.set for part in ("--set", each))]
    try:
        with a_second_signal_kills(clocks):
            if options.task == "train":
                found = run_ranks(spec, command)
            else:
                found = run_one(command)
        reported = failures.recorded(directory)
    except Signalled as stop:
        permanent = [failure for failure in failures.recorded(directory) if not retryable(failure.code)]
        if not permanent:
            return *_stopped(spec, clocks, stop.number), ""
        found, reported = permanent, []
    finally:
        over.set()
        shutil.rmtree(directory, ignore_errors=True)
    if not found:
        return ExitCode.OK, f"{options.task} finished", ""
    if out_of_memory_kills() > kills_before:
        found = [
            replace(each, reason=failures.OUT_OF_MEMORY) if each.code == ExitCode.KILLED else each for each in found
        ]
    # A rank's recorded reason is more specific than its exit code, but a rank killed by a signal could not record one.
    by_rank = {failure.rank: failure for failure in found} | {failure.rank: failure for failure in reported}
    cause = failures.root_cause(by_rank.values())
    return cause.code, f"rank {cause.rank}: {cause.reason}", failures.label(cause)


def run_ranks(spec: TrainSpec, command: list[str]) -> list[Failure]:
    """Run torchrun's agent in this process; returns the failures of this node's ranks, empty after success."""
    with uncollected():
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError

    _silence_agent()
    arguments = torchrun.parse_args([*torchrun_options(spec), *RANK_PROGRAM, *command])
    if hosts := rendezvous_hosts():
        from trainer.distributed import wait_for_host

        # Any worker may queue for hours; launcher, lease and deadline limit this wait, not the rendezvous timeout,
        # which would
        # use up restarts.
        for host in hosts:
            wait_for_host(host, HOST_PATIENCE_SECONDS)
    # How long the agent waits between forwarding a stop signal and killing: the time of a checkpoint.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(spec.runtime.hang_timeout_seconds))
    if spec.engine == "megatron":
        _let_agents_wait()
    try:
        torchrun.run(arguments)
    except SignalException as stop:
        raise Signalled(stop.sigval) from None
    except ChildFailedError as error:
        return [_describe(rank, failure.exitcode) for rank, failure in error.failures.items()]
    except RendezvousError as error:
        raise CommunicationError(f"rendezvous failed: {' '.join(str(error).split())}") from error
    finally:
        _catch_signals()  # the agent has replaced the handlers
    return []


def _let_agents_wait() -> None:
    """Let nodes that are done wait while rank 0 converts Megatron's weights, longer than torchrun's 300 s.

    When one of the workers has ended, the operator would remove the others.
    """
    from torch.distributed.launcher import api

    patient = partial(api.LocalElasticAgent, exit_barrier_timeout=HOST_PATIENCE_SECONDS)
    setattr(api, "LocalElasticAgent", patient)  # noqa: B010  # torchrun has no option for it


def _silence_agent() -> None:
    """Silence the agent, which reports signals and failed ranks in a dozen lines; this process does it in one."""
    if os.environ.get("YAONGI_VERBOSE"):
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def a_second_signal_kills(clocks: Limits) -> Iterator[None]:
    """After the first stop signal torchrun's agent waits for the ranks' checkpoint; a second one kills them at once.

    Not if a limit has passed, because then no person asked twice. A thread reads the wakeup descriptor to which Python
    writes each signal, because the agent has its own handlers.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def look() -> None:
        stops = 0
        while number := os.read(told, 1):
            stops += number[0] in (signal.SIGTERM, signal.SIGINT)
            if stops == 2 and not clocks.passed():
                log.warning("told to stop a second time; not waiting for a checkpoint")
                kill_ranks()
        os.close(told)

    threading.Thread(target=look, name="second signal", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(tell)


def kill_ranks() -> None:
    """Kill this process's children at once. Linux only; elsewhere they end after they have saved."""
    for listed in Path("/proc/self/task").glob("*/children"):
        for pid in listed.read_text(encoding="ascii").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def run_one(command: list[str]) -> list[Failure]:
    """Run a task that is one process; stop signals are forwarded to it."""
    process = subprocess.Popen([sys.executable, "-u", *RANK_PROGRAM, *command])
    try:
        process.wait()
    except Signalled as stop:
        process.send_signal(stop.number)
        process.wait()
        raise
    return [_describe(0, process.returncode)] if process.returncode else []


def fit_ranks(spec: TrainSpec) -> None:
    """Outside a cluster, start no more processes than the machine has GPUs, if it has any."""
    wanted = os.environ.get("PET_NPROC_PER_NODE", "")
    if not (thismachine.is_meant() and wanted.isdecimal()) or spec.runtime.device == "cpu":
        return
    gpus = _gpus()
    fitting = thismachine.ranks(spec, int(wanted), gpus)
    if fitting != int(wanted):
        log.info("this machine has %d GPU%s: %d of the job's %s ranks", gpus, "s" * (gpus > 1), fitting, wanted)
        os.environ["PET_NPROC_PER_NODE"] = str(fitting)


def torchrun_options(spec: TrainSpec) -> list[str]:
    """Options that torchrun cannot know or guesses wrongly: processes per node, and a single-machine rendezvous.

    Raises:
        SpecError: several nodes without a rendezvous address.
    """
    options = []
    wanted = os.environ.get("PET_NPROC_PER_NODE", "auto")
    gpus = _gpus() if spec.runtime.device != "cpu" else 0
    if wanted == "auto":  # torchrun would start one process per core
        wanted = str(gpus or 1)
        options += [f"--nproc-per-node={wanted}"]
    if not gpus:  # DDP's C++ code warns about the setting that keeps its sums in one order on a CPU
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if wanted != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if rendezvous_host() is None:
        if os.environ.get("PET_NNODES", "1") not in ("1", "1:1"):
            raise SpecError(
                f"PET_NNODES is {os.environ['PET_NNODES']} but neither PET_RDZV_ENDPOINT nor PET_MASTER_ADDR is set; "
                "give the job an elasticPolicy, whose operator sets them",
            )
        options += ["--standalone"]
    return options


def rendezvous_host() -> str | None:
    """The rendezvous host; None for a single machine."""
    endpoint = os.environ.get("PET_RDZV_ENDPOINT")
    return endpoint.rpartition(":")[0] or endpoint if endpoint else os.environ.get("PET_MASTER_ADDR")


def leads() -> bool:
    """Whether this is the only node, or the one where the others meet."""
    host = rendezvous_host()
    return host is None or host.partition(".")[0] == socket.gethostname().partition(".")[0]


def rendezvous_hosts() -> list[str]:
    """Hosts of all nodes, the rendezvous host first; only that one if the others' names are unknown.

    The operators number a job's workers: `job-worker-0`, or `job-node-0-0.job` for a TrainJob.
    """
    if (host := rendezvous_host()) is None:
        return []
    fewest, _, most = os.environ.get("PET_NNODES", "1").partition(":")
    numbered = _FIRST_WORKER.search(host)
    if numbered is None or not fewest.isdecimal() or most not in ("", fewest):
        return [host]
    before, after = host[: numbered.start(1)], host[numbered.end(1) :]
    return [f"{before}{worker}{after}" for worker in range(int(fewest))]


def write_termination_message(code: int, reason: str) -> None:
    """Write one line of JSON to Kubernetes' termination message file; elsewhere do nothing."""
    file = Path(os.environ.get(TERMINATION_LOG_VARIABLE, TERMINATION_LOG))
    if not file.exists():
        return
    meaning = failures.meaning(code)
    message: dict[str, Any] = {"code": int(code), "meaning": meaning, "retryable": retryable(code), "reason": reason}
    while len(text := json.dumps(message, ensure_ascii=False).encode()) > _TERMINATION_BYTES:
        message["reason"] = message["reason"][: len(message["reason"]) * 3 // 4]
    try:
        file.write_bytes(text)
    except OSError as error:
        log.warning("%s cannot be written (%s)", file, error.strerror)


def newest_step(spec: TrainSpec) -> int:
    """The step from which the run would go on."""
    return max(latest_step(spec.run_dir), megatron_step(spec.run_dir) if spec.engine == "megatron" else 0)


def _stopped(spec: TrainSpec | None, clocks: Limits | None, number: int) -> tuple[int, str]:
    """Exit code and reason after a stop signal, which a passed limit may have sent."""
    if clocks is not None and (reason := clocks.passed()):
        return ExitCode.LIMIT, reason
    code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED
    step = newest_step(spec) if spec else 0
    saved = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint yet"
    return code, f"stopped by {signal.Signals(number).name}; {saved}"


def _describe(rank: int, returncode: int) -> Failure:
    code = of_process(returncode)
    if returncode < 0:
        return Failure(rank, code, f"ended by {signal.Signals(-returncode).name}")
    if code in STOPS or code == ExitCode.LIMIT:
        return Failure(rank, code, failures.meaning(code))
    return Failure(rank, code, f"exit code {code} ({failures.meaning(code)})")


def _watch(clocks: Limits, directory: Path, over: threading.Event) -> None:
    """Ends the processes by SIGTERM, so that they save a checkpoint, when deadline or lease has passed."""
    while not over.wait(limits.LOOK_SECONDS):
        if reason := clocks.passed():
            try:
                limits.tell(directory, reason)
            except OSError as error:  # /tmp is full; this process still knows the reason
                log.warning("the ranks cannot be told why they stop (%s)", error.strerror)
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _catch_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_signalled)


def _raise_signalled(number: int, _frame: FrameType | None) -> None:
    _ignore_signals()  # only once: a second signal must not interrupt the stop
    raise Signalled(number)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _gpus() -> int:
    with uncollected():
        import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main())

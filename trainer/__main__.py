"""`python -m trainer [train|evaluate|export] --spec FILE [--set a.b=c]…`: one rank, or one process of a small task.

The process reports only its exit code (trainer/exitcodes.py) and a one-line reason. trainer/entrypoint.py starts runs
of several ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trainer.exitcodes import ExitCode
from trainer.process import failures
from trainer.process.importing import uncollected
from trainer.process.launcher import Launcher
from trainer.recording import logs
from trainer.spec import TrainSpec
from trainer.specbase import changes_from_sets, deep_merge, parse, read_yaml

TASKS = ("train", "evaluate", "export")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def parser(program: str) -> argparse.ArgumentParser:
    """The command line, shared by a single rank and the entrypoint."""
    made = argparse.ArgumentParser(prog=f"python -m {program}", description="Train, evaluate or export one model.")
    made.add_argument("task", nargs="?", choices=TASKS, default="train")
    made.add_argument("--spec", required=True, metavar="FILE", help="TrainSpec as YAML or JSON")
    made.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one field; may be repeated")
    return made


def load_spec(file: str, assignments: Sequence[str]) -> TrainSpec:
    """The spec of a file with `--set` changes applied.

    Raises:
        SpecError: one line for each problem.
    """
    value = deep_merge(read_yaml(file), changes_from_sets(list(assignments)))
    return parse(TrainSpec, value, file)


def main(arguments: Sequence[str] | None = None) -> int:
    # Otherwise threads spin while they wait for a preempted one: beside two busy processes, an evaluation of 17 s took
    # 69 s, and 18 s with this setting; alone it takes 18 s. Read when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    end_with_parent()
    failures.forget()
    options = parser("trainer").parse_args(arguments)
    try:
        spec = load_spec(options.spec, options.set)
        logs.setup(spec.run_dir, int(os.environ.get("RANK", "0")))
        return run(options.task, spec)
    except KeyboardInterrupt:
        code, reason = int(ExitCode.INTERRUPTED), "interrupted before a checkpoint could be saved"
        print(reason, file=sys.stderr)
    except Exception as error:
        code, reason = failures.classify(error)
        failures.show(error, code, reason)
        logs.note(f"ended with exit code {int(code)}: {reason}", error)
    failures.record(code, reason)
    return int(code)


def end_with_parent() -> None:
    """If the entrypoint is killed, its ranks get the signal that makes them save a checkpoint and exit."""
    if failures.DIRECTORY_VARIABLE not in os.environ:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if Launcher().is_gone():  # it died before prctl
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        Launcher().end_with()


def run(task: str, spec: TrainSpec) -> int:
    """Do one task in this process; returns its exit code."""
    result = _imported(task, spec)(spec)
    return result if task == "train" else int(ExitCode.OK)


def _imported(task: str, spec: TrainSpec) -> Callable[[TrainSpec], Any]:
    with uncollected():
        if task == "train" and spec.engine == "megatron":
            from trainer.megatron.train import train as train_by_megatron

            return train_by_megatron
        if task == "train":
            from trainer.loop import train

            return train
        if task == "evaluate":
            from trainer.evaluate import run as evaluate

            return evaluate
        from trainer.export import run as export

        return export


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure threads may hang in a collective that never finishes, and after success torch's
    # teardown has been seen to abort a finished process.
    os._exit(exit_code)

"""Run the pipeline object under kfp.local: the child process of `yaongi run`, which shows its output.

    python -m pipelines.execute ARGUMENTS.json PIPELINE_ROOT [STAGE]

It is a separate process because kfp.local writes to stdout, replaces print and cannot be stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from components.plan.enough import DATA_ALONE_VARIABLE
from components.quick import local_kfp
from components.running import told_to_stop
from trainer.process.launcher import Launcher, named


def main() -> int:
    arguments = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # A signal goes to every process of this session. The steps obey it and no further step begins; this process stays
    # until they have ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    launcher = Launcher()
    os.environ |= named()  # so that the steps end with this process
    if stage := "".join(sys.argv[3:4]):
        os.environ[DATA_ALONE_VARIABLE] = stage
    warnings.filterwarnings("ignore", message="You may be attemping to run a task that uses custom or non-Python")

    with local_kfp():
        from kfp import local
        from kfp.local import subprocess_task_handler

        from pipelines.pretrain import pretrain
        from pipelines.stepserver import StepServer

    if told := told_to_stop():
        return 128 + told
    steps = StepServer()
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    if stage:
        cut_after(stage, pretrain.pipeline_spec)
    subprocess_task_handler.run_local_subprocess = steps.run
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[2])
    try:
        pretrain(**arguments)
    except RuntimeError as error:  # kfp.local raises it when a step failed; the step has printed why
        print(error)
        return 1
    finally:
        steps.close()
    return 0


def cut_after(stage: str, pipeline: Any) -> None:
    """Remove the tasks that a data stage does not need from a compiled pipeline (kfp's PipelineSpec).

    The step `data` ends after the stage that its environment names; the loop beside it finishes the shards.
    """
    (dag,) = (each.dag for each in pipeline.components.values() if "data" in each.dag.tasks)
    loops = [name for name, task in dag.tasks.items() if task.HasField("parameter_iterator")]
    needed, found = set[str](), ["data", *(loops if stage == "shards" else [])]
    while found:
        needed.add(name := found.pop())
        found += dag.tasks[name].dependent_tasks
    for name in set(dag.tasks) - needed:
        del dag.tasks[name]


def _end_with(launcher: Launcher) -> None:
    """If `yaongi run` was killed, stop the processes it started."""
    launcher.wait()
    # Nobody reads the output either: a broken pipe must not end this process before the steps.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

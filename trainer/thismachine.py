"""Settings that a local run adapts to its machine, and a pod does not: the number of ranks, and ports.

In a pod the rendered objects fix both. On a local machine the number of ranks follows the GPUs, and the default metrics
port is replaced if it is taken. Imports no torch.
"""

from __future__ import annotations

import os

from trainer.arithmetic.memory import choose_layout
from trainer.runtimespec import RuntimeSpec
from trainer.spec import TrainSpec

VARIABLE = "YAONGI_THIS_MACHINE"  # set by the local launcher
PORTS_FILE = "metrics_ports.json"  # in the run directory: the port of each rank, 0 for none
DEFAULT_PORT = RuntimeSpec().metrics_port


def is_meant() -> bool:
    return VARIABLE in os.environ


def port_may_move(runtime: RuntimeSpec) -> bool:
    """Whether a taken metrics port is replaced by the next free one; a port that the user chose is not."""
    return is_meant() and runtime.metrics_port == DEFAULT_PORT


def ranks(spec: TrainSpec, wanted: int, gpus: int) -> int:
    """Number of processes to start: the job's, but on GPUs at most the number of GPUs.

    If there are fewer GPUs, the largest number that can share the batch and the model. If no number can (possible only
    for jobs with experts spread over ranks), the number of GPUs, and the ranks report the problem.
    """
    if not gpus or wanted <= gpus:
        return wanted
    return next((number for number in range(gpus, 0, -1) if _can_share(spec, number)), gpus)


def _can_share(spec: TrainSpec, number: int) -> bool:
    try:
        spec.check_shares(number)
        choose_layout(spec.parallel, spec.model, spec.optimizer, number, number, None)
    except ValueError:
        return False
    return True

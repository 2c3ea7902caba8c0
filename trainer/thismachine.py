"""What a run takes from the machine on which a person starts it, and a pod must not: how many ranks, which ports.

In a pod both are part of what was rendered: a service account for so many processes, a monitor's named ports. Here the
ranks follow the GPUs that are there, and the default metrics port gives way where it is taken. Imports no torch.
"""

from __future__ import annotations

import os

from trainer.arithmetic.memory import choose_layout
from trainer.spec import RuntimeSpec, TrainSpec

VARIABLE = "YAONGI_THIS_MACHINE"  # set by what starts the trainer here
PORTS_FILE = "metrics_ports.json"  # in the run directory: the port of each rank, 0 where it serves none
DEFAULT_PORT = RuntimeSpec().metrics_port


def is_meant() -> bool:
    return VARIABLE in os.environ


def port_may_move(runtime: RuntimeSpec) -> bool:
    """Whether a taken metrics port is passed over for the next free one; one that was named stays."""
    return is_meant() and runtime.metrics_port == DEFAULT_PORT


def ranks(spec: TrainSpec, wanted: int, gpus: int) -> int:
    """Processes to start: as many as the job says, on GPUs no more than there are.

    Of fewer ones the most that can share the batch and the model; without such a number, which one rank is for all but
    jobs with experts spread over ranks, as many as GPUs, and the ranks say what does not fit.
    """
    if not gpus or wanted <= gpus:
        return wanted
    return next((number for number in range(gpus, 0, -1) if _can_share(spec, number)), gpus)


def _can_share(spec: TrainSpec, number: int) -> bool:
    try:
        spec.micro_batches(number)
        choose_layout(spec.parallel, spec.model, spec.optimizer, number, number, None)
    except ValueError:
        return False
    return True

"""What the start of a run has proven and timed, in one file beside the run, for its report. Written by rank 0."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from trainer import parity
from trainer.files import atomic_write
from trainer.process.failures import node_name
from trainer.proof.start import Proof, outcome
from trainer.proof.trial import Trial, Way

log = logging.getLogger(__name__)

FILE = "proof.json"


def keep(run_dir: str, proofs: dict[str, Proof], way: Way, trial: Trial | None) -> None:
    """Write the file; remove that of an earlier start where nothing was proven now, as on a CPU. A place that cannot be
    written is told, and the run goes on.

    Args:
        proofs: by node.
        way: what the run uses.
    """
    file = Path(run_dir) / FILE
    try:
        if not proofs:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(content(proofs, way, trial), indent=1).encode())
    except OSError as error:
        log.warning("%s cannot be written (%s), so the report will not show the kernels", file, error.strerror)


def content(proofs: dict[str, Proof], way: Way, trial: Trial | None) -> dict[str, Any]:
    own = proofs.get(node_name()) or next(iter(proofs.values()))
    used = {op: choice.name for op, choice in way.choices.items()}
    implementation = way.precision.fp8.implementation if way.precision.fp8 else None
    kernels = []
    for comparison in own.comparisons:
        passed, said = outcome(own, comparison)
        kernels.append(
            {
                "operation": comparison.op,
                "backend": comparison.backend,
                "format": comparison.variant,
                "package": comparison.package,
                "version": parity.package_version(comparison.package),
                "passed": passed,
                "outcome": said,
                "used": used.get(comparison.op, implementation) == comparison.backend,
            }
        )
    return {
        "kernels": kernels,
        "made": own.made,
        "seconds": own.seconds,
        "remarks": [f"{node}: {said}" for node, proof in proofs.items() for said in (*proof.problems, *proof.wrong)],
        "chosen": way.names,
        "precision": way.precision.reason,
        "reasons": {op: choice.reason for op, choice in way.choices.items()},
        "trial": {"rows": [vars(row) for row in trial.rows], "seconds": trial.seconds} if trial else None,
    }

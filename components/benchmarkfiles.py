"""The files that the benchmarks of an evaluation on a cluster read, checked before anything is trained."""

from __future__ import annotations

from pathlib import Path

from manifests.spec import JobSpec
from trainer.errors import SpecError


def check(job: JobSpec) -> None:
    """Return if the pods of the evaluation will find the files, or run elsewhere.

    Raises:
        SpecError: a file is missing, or is not on a volume that the pods have.
    """
    if job.cluster.target != "kubernetes":
        return
    volumes = [Path(job.storage.datasets_dir), Path(job.storage.checkpoints_dir)]
    for field, path in job.train_spec().evaluate.files.items():
        if not any(Path(path).is_relative_to(volume) for volume in volumes):
            raise SpecError(
                f"train.evaluate.{field}: {path} is not on a volume of the cluster; copy it below {volumes[0]} or "
                f"{volumes[1]} and write that path"
            )
        if not Path(path).exists():
            raise SpecError(f"train.evaluate.{field}: {path} is not there; copy it to the volume")

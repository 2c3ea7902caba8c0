"""Files of earlier versions (tests/fixtures), unpacked in a folder of the test."""

from __future__ import annotations

import tarfile
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
MADE_IN = "/tmp/yaongi-v0.1"
RUN = "micro-e6ef8d8f"


def unpack(folder: Path) -> Path:
    """Unpack `work`, `texts` and `job.yaml` of version 0.1 to `folder`, adapt paths; returns the run directory."""
    with tarfile.open(FIXTURES / "v0.1" / "micro.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    run = folder / "work" / "checkpoints" / "runs" / RUN
    for file in (run / "job.yaml", run / "train.yaml", folder / "work" / "processes" / f"{RUN}.yaml"):
        file.write_text(file.read_text(encoding="utf-8").replace(MADE_IN, str(folder)), encoding="utf-8")
    return run

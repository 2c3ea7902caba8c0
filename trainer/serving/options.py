"""The options of the server. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import LaunchError, SpecError

NEEDED = ("fastapi", "uvicorn")
Device = Literal["auto", "cpu", "cuda"]
Weights = Literal["auto", "fp32", "bf16", "int8", "fp8"]  # as in trainer/loading.py, which imports torch
HELP = {
    "host": "Address to listen on; 0.0.0.0 for all.",
    "port": "Port; 0: any free one.",
    "rows": "Texts at the same time.",
    "length": "Tokens of the longest text, prompt included; 0: as long as in training.",
    "max_waiting": "Texts that may wait beside them; more get status 429.",
    "device": "auto, cpu or cuda.",
    "weights": "How weights are held; auto: as stored, FP32 as BF16 on a GPU that has it.",
    "metrics_port": "Port of the metrics for Prometheus; 0: none.",
    "timeout": "Seconds for an answer, its wait included.",
    "grace": "Seconds that running answers have after SIGTERM.",
}


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        export: folder of an exported model.
        others: see HELP.

    Raises:
        SpecError: a value out of range.
    """

    export: Path
    host: str = "127.0.0.1"
    port: int = 8000
    rows: int = 64
    length: int = 0
    max_waiting: int = 256
    device: Device = "auto"
    weights: Weights = "auto"
    metrics_port: int = 0
    timeout: float = 600.0
    grace: float = 60.0

    def __post_init__(self) -> None:
        for name, fine, wanted in (
            ("port", 0 <= self.port < 2**16, "between 0 and 65535"),
            ("metrics_port", 0 <= self.metrics_port < 2**16, "between 0 and 65535"),
            ("rows", self.rows >= 1, "at least 1"),
            ("length", self.length == 0 or self.length >= 2, "0 or at least 2"),
            ("max_waiting", self.max_waiting >= 0, "at least 0"),
            ("timeout", self.timeout > 0, "above 0"),
            ("grace", self.grace >= 0, "at least 0"),
        ):
            if not fine:
                raise SpecError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {wanted}")


def prepare() -> None:
    """Before PyTorch is imported.

    Raises:
        LaunchError: the packages of the extra `serve` are missing.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise LaunchError(f"{missing[0]} is not installed; run: pip install 'yaongi[serve]'")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in trainer/__main__.py, for the same reason

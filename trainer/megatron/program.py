"""Where Megatron-LM's program is, without importing it. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from trainer.errors import SpecError

PROGRAM = "pretrain_gpt"


def find_program() -> Path:
    """Megatron's pretrain_gpt.py.

    Raises:
        SpecError: it is not installed here.
    """
    found = importlib.util.find_spec(PROGRAM)
    if found is None or found.origin is None:
        raise SpecError(
            f"train.engine megatron: there is no {PROGRAM}.py on PYTHONPATH, so Megatron-LM is not in this image; use "
            "the image of docker/megatron.Dockerfile (cluster.image), or train.engine yaongi"
        )
    return Path(found.origin)

"""Our arguments in Megatron-LM's parser and checks, which its package on PyPI lacks: MEGATRON_LM names a checkout.

It may need einops.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKOUT = os.environ.get("MEGATRON_LM", "")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout of Megatron-LM"),
]


def test_megatron_takes_our_arguments() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), CHECKOUT, *sys.path])}
    command = [sys.executable, str(ROOT / "docker" / "check_megatron.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Megatron takes the arguments of 7 jobs")

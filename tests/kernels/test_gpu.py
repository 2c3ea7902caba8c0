"""Every backend that runs on the GPU at hand against its reference, in each number format, and the proof of a start
there (make test-gpu)."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer import parity
from trainer.ops import OPS
from trainer.ops.check import compare, variants
from trainer.proof import prove
from trainer.proof.comparisons import Comparison, everything
from trainer.proof.prove import Limits
from trainer.proof.start import of_node

pytestmark = pytest.mark.gpu

CASES = [(op.name, backend) for op in OPS.values() for backend in op.backends if backend != "reference"]


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_a_backend_equals_its_reference(op, backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = list(variants(op, backend, torch.device("cuda")))
    if not settings:
        pytest.skip("cannot run here")
    for setting in settings:
        record = compare(op, backend, setting)
        assert record.passed, record


def test_what_is_installed_is_proven_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(parity, "committed", lambda: ())
    device = torch.device("cuda", 0)
    try:
        found = of_node(everything(device), device, None, Limits())
        assert found.made >= len(OPS) and not found.problems and not found.wrong, found
        assert of_node(everything(device), device, None, Limits()).made == 0
    finally:
        parity.forget()


def test_after_an_error_that_ends_a_gpus_context_the_next_kernel_is_still_judged_rightly(
    monkeypatch: pytest.MonkeyPatch,
):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    attention = OPS["attention"]
    twin = replace(attention.backends["sdpa"], portable=False)
    monkeypatch.setitem(OPS, "attention", replace(attention, backends={"asserts": twin, **attention.backends}))
    comparisons = [Comparison("attention", name, "fp32") for name in ("asserts", "sdpa")]
    child = (sys.executable, str(Path(__file__).with_name("gpu_child.py")))
    broken, sound = prove.prove(comparisons, torch.device("cuda", 0), command=child).records
    assert not broken.passed and "assert" in broken.outcome and sound.passed

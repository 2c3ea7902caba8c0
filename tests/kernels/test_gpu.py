"""Every backend that runs on the GPU at hand against its reference, in each number format (make test-gpu)."""

import pytest
import torch

from trainer.ops import OPS
from trainer.ops.check import compare, variants

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

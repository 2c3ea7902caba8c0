"""Our Triton kernels in layers that are recorded, in Triton's interpreter (make test-kernels)."""

import os

import pytest
import torch
from tape import Tape

from trainer.model.graphs import LayerGraphs
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.spec import BackendsSpec

pytestmark = pytest.mark.kernels

SPEC = ModelSpec(
    vocab_size=50,
    hidden=16,
    layers=["NE", "-E"],
    mlp={"width": 16},
    moe={"num_experts": 4, "top_k": 2, "expert_width": 16},
    engram=[{"layer": 0, "rows_per_head": 20, "width_per_order": 8, "num_heads": 2, "compress_tokens": False}],
)
BACKENDS = BackendsSpec(experts="triton", router="triton", engram="triton", add_norm="triton")


@pytest.fixture(autouse=True)
def interpreted():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton reads TRITON_INTERPRET=1 when it is imported")


def steps(model: HybridModel) -> list[torch.Tensor]:
    """Losses and gradients of two passes over other documents, with other weights."""
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(50, (1, 24), generator=generator)
        begins_BT = torch.rand(1, 24, generator=generator) < 0.1
        begins_BT[:, 0] = False
        batch = ids_BT, begins_BT.int().cumsum(1, dtype=torch.int32), ids_BT.roll(-1, dims=1)
        output = model(*batch, int(begins_BT.sum()) + 1)
        (output.ce_sum + output.aux_sum).backward()
        found += [output.ce_sum.detach(), output.expert_load_LE]
        with torch.no_grad():
            for parameter in model.parameters():
                found.append(parameter.grad.clone())
                parameter.sub_(0.01 * parameter.grad)
                parameter.grad = None
    return found


def test_no_kernel_is_left_out_of_a_recording():
    """One that is launched by Python and not by an operator would be missing from the second pass on."""
    model = build_model(SPEC, BACKENDS, seed=0)
    tape = Tape()
    model.graphs = LayerGraphs(model, pytest.fail, lambda device: tape)
    found, expected = steps(model), steps(build_model(SPEC, BACKENDS, seed=0))
    assert tape.replays == 2 * tape.recordings == 2 * 5
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-7)

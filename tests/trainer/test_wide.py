"""BF16 multiplied as FP32 is BF16 multiplied: the same model, with and without, against itself in FP32."""

from __future__ import annotations

import pytest
import torch
from bounds import below

from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.ops import wide

SPEC = ModelSpec(
    vocab_size=128,
    hidden=32,
    layers=["M", "E", "*", "-"],
    mamba={"num_heads": 4, "head_dim": 8, "d_state": 16, "num_groups": 1, "chunk_size": 16},
    attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    moe={"num_experts": 4, "top_k": 2, "expert_width": 32},
    mlp={"width": 64},
)
DECODER = SPEC.updated(
    {
        "layers": ["*-", "*E"],
        "attention": {"rope_theta": 1e4, "qk_norm": True, "bias": True},
        "moe": {"activation": "swiglu", "scores": "softmax"},
        "mlp": {"activation": "swiglu", "bias": True},
        "tied_embedding": True,
    }
)


def gradients(spec: ModelSpec, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Loss and gradients of two rows of two documents."""
    torch.manual_seed(0)
    ids_BT = torch.randint(0, 128, (2, 64))
    seq_idx_BT = (torch.arange(64) > 30).int().expand(2, -1).contiguous()
    model = build_model(spec, seed=0, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        loss = model(ids_BT, seq_idx_BT, ids_BT).ce_sum
    loss.backward()
    return {"loss": loss.detach()} | {name: value.grad for name, value in model.named_parameters()}


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all gradients laid end to end."""
    norms = [sum(float(value.square().sum()) for value in values) ** 0.5 for values in _pairs(found, exact)]
    return norms[0] / norms[1]


def _pairs(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[list, list]:
    names = [name for name in exact if name != "loss"]
    return [found[name] - exact[name] for name in names], [exact[name] for name in names]


@pytest.mark.parametrize("spec", [SPEC, DECODER], ids=["hybrid", "decoder"])
def test_it_rounds_as_bf16_does_and_no_further(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gradients(spec, None)
    monkeypatch.setattr(wide, "MULTIPLIES_BF16", True)
    theirs = gradients(spec, torch.bfloat16)
    monkeypatch.setattr(wide, "MULTIPLIES_BF16", False)
    ours = gradients(spec, torch.bfloat16)
    assert ours["loss"] == pytest.approx(theirs["loss"].item(), rel=1e-3)
    error, usual = distance(ours, exact), distance(theirs, exact)
    below(1e-4, error, "BF16's rounding is there")
    below(error, 3 * usual, "and not more of it")  # about the same as `usual`; FP8's is 16 times as much
    below(distance(ours, theirs), 3 * usual)


def test_only_bf16_on_a_cpu_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(wide, "MULTIPLIES_BF16", False)
    assert wide.computed_in(torch.bfloat16, cpu) == torch.float32
    assert wide.computed_in(torch.bfloat16, gpu) == torch.bfloat16
    assert wide.computed_in(torch.float16, cpu) == torch.float16
    monkeypatch.setattr(wide, "MULTIPLIES_BF16", True)
    assert wide.computed_in(torch.bfloat16, cpu) == torch.bfloat16

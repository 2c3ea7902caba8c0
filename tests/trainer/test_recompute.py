"""Activation checkpointing: the same gradients, and the bytes that trainer.arithmetic.activations computes."""

import pytest
import torch

from manifests.spec import load_job
from trainer.arithmetic.activations import activations
from trainer.fp8.convert import convert
from trainer.model.hybrid import HybridModel, build_model
from trainer.model.recompute import set_policy
from trainer.modelspec import ModelSpec
from trainer.ops import wide
from trainer.spec import Fp8Spec

POLICIES = ["none", "selective", "full"]
# Wide enough that what grows with tokens · width stands out, as in the large presets.
SPEC = ModelSpec(
    vocab_size=64,
    hidden=256,
    layers=["ME", "N", "*-", "ME"],
    mamba={"num_heads": 4, "head_dim": 32, "d_state": 32, "chunk_size": 64},
    attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    moe={"num_experts": 8, "top_k": 3, "expert_width": 64, "shared_width": 32},
    mlp={"width": 128},
    engram=[{"layer": 1, "rows_per_head": 50, "width_per_order": 64, "num_heads": 2, "compress_tokens": False}],
    mtp={"depth": 1, "layer": "*E"},
)


DECODER = ModelSpec(
    vocab_size=64,
    hidden=256,
    layers=["*-", "*E"],
    attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rope_theta": 1e4, "qk_norm": True, "bias": True},
    moe={"num_experts": 8, "top_k": 3, "expert_width": 64, "shared_width": 32, "activation": "swiglu"}
    | {"scores": "softmax", "balance_loss_weight": 0.01},
    mlp={"width": 128, "activation": "swiglu", "bias": True},
    tied_embedding=True,
)


def step(model: HybridModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Gradients of one pass over packed rows, and the counts of the experts."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, model.spec.vocab_size, (rows, length), generator=generator)
    seq_idx_BT = (torch.arange(length) > length // 3).int().expand(rows, -1).contiguous()
    model.zero_grad()
    output = model(ids_BT, seq_idx_BT, ids_BT.roll(-1, dims=1))
    (output.ce_sum + output.aux_sum + output.mtp_ce_sum_K.sum()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {**found, "loads": output.expert_load_LE, "loss": output.ce_sum.detach()}


@pytest.mark.parametrize("spec", [SPEC, DECODER], ids=["hybrid", "decoder"])
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_gradients_and_loads_are_those_without_to_the_last_bit(policy, spec):
    model = build_model(spec, seed=0)
    expected = step(model, 2, 96)
    set_policy(model, policy)
    found = step(model, 2, 96)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found["loads"].sum(1).eq(2 * 96 * spec.moe.top_k).all()


def kept_bytes(model: HybridModel, rows: int, dtype: torch.dtype | None) -> int:
    """Bytes of all storages that autograd keeps after a forward pass."""
    ids_BT = torch.zeros(rows, 128, dtype=torch.int64)
    seq_idx_BT = (torch.arange(128) > 60).int().expand(rows, -1).contiguous()
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, or its address would be used again
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        output = model(ids_BT, seq_idx_BT, ids_BT)
    assert output.ce_sum.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(
    ("layers", "spec"),
    [
        *((layers, SPEC) for layers in ("all", "M", "E", "*", "-", "N")),
        *((layers, DECODER) for layers in ("all", "E", "*", "-")),
    ],
)
def test_bytes_are_those_that_autograd_keeps(policy, precision, dtype, layers, spec, monkeypatch):
    """Within 3%. The difference of two sizes of batch, so that weights and their casts do not count."""
    monkeypatch.setattr(wide, "MULTIPLIES_BF16", True)  # as on a GPU, for which the bytes are foretold
    alone = {"layers": ["-", "N"]} if layers == "N" else {"layers": [layers] * 3, "engram": []}
    spec = spec if layers == "all" else spec.updated({**alone, "mtp": None})
    model = build_model(spec, seed=0)
    set_policy(model, policy)
    measured = (kept_bytes(model, 6, dtype) - kept_bytes(model, 2, dtype)) / (4 * 128)
    if layers in ("all", "*"):  # the documents hold their masks, whether autograd sees them or not
        measured += 128 * (1 + (dtype or torch.float32).itemsize * (policy == "full"))
    assert activations(spec, 128, policy, precision).kept == pytest.approx(measured, rel=0.03)


def test_policies_keep_less_and_less_of_the_large_presets():
    for preset in ("h100-4b", "h100-4b-interleaved"):
        none, selective, full = (activations(load_job(preset).train.model, 4096, policy) for policy in POLICIES)
        assert full.peak < 0.75 * selective.peak and selective.peak < 0.75 * none.peak
        assert not none.recomputed and len(selective.recomputed) >= 3 and full.recomputed


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_fp8_scales_do_not_notice(policy):
    """Delayed scaling keeps maxima of what it has seen: seen twice, it must have seen the same."""
    fp8 = Fp8Spec(recipe="delayed", implementation="emulated")

    def two_steps(policy: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model = build_model(SPEC, seed=0)
        state = convert(model, SPEC, fp8, torch.device("cpu"))
        set_policy(model, policy)
        step(model, 1, 32)
        state.finish_step()
        return step(model, 1, 32), state.last_amax_N

    (expected, amax), (found, amax_again) = two_steps("none"), two_steps(policy)
    assert torch.equal(amax, amax_again) and amax.gt(0).any()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

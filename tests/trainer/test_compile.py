"""Layers under torch.compile: one graph for each kind, none again over many packed batches, and the same numbers."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from trainer.model.compiling import compile_layers
from trainer.model.hybrid import HybridModel, build_model
from trainer.model.recompute import set_policy
from trainer.modelspec import ModelSpec

SPEC = ModelSpec(
    vocab_size=128,
    hidden=64,
    layers=["ME", "N", "*-", "ME", "*-"],
    mamba={"num_heads": 2, "head_dim": 32, "d_state": 16, "chunk_size": 32},
    attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 32},
    moe={"num_experts": 8, "top_k": 2, "expert_width": 32},
    mlp={"width": 64},
    engram=[{"layer": 1, "rows_per_head": 50, "width_per_order": 32, "num_heads": 2, "compress_tokens": False}],
    mtp={"depth": 1, "layer": "E"},
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches(steps: int, length: int = 64):
    """Rows cut into documents at random, so that no two batches have as many, and other experts are chosen."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        ids_BT = torch.randint(0, SPEC.vocab_size, (2, length), generator=generator)
        seq_idx_BT = (torch.rand(2, length, generator=generator) < 0.08).int().cumsum(1, dtype=torch.int32)
        yield ids_BT, seq_idx_BT, ids_BT.roll(-1, dims=1)


def train(model: HybridModel, *, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for batch in batches(steps):
        output = model(*batch)
        (output.ce_sum + output.aux_sum + output.mtp_ce_sum_K.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(output.expert_load_LE)
        losses.append(output.ce_sum.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "steps"), [("none", 50), ("selective", 10), ("full", 10)])
def test_no_graph_break_and_no_recompilation_over_packed_batches(policy, steps):
    """What dynamo captures does not depend on the backend; this one makes no code of its own, so that it is quick."""
    expected = train(build_model(SPEC, seed=0), steps=steps)
    model = build_model(SPEC, seed=0)
    set_policy(model, policy)
    compile_layers(model, whole=True, backend="aot_eager")
    train(model, steps=1)
    # Kinds of layers share the code of Layer.forward, where dynamo would take the second kind for a recompilation.
    kinds = len(set(SPEC.layers) | {SPEC.mtp.layer})
    assert counters["stats"]["unique_graphs"] == kinds and not counters["graph_break"]
    model.init_weights(0, None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train(model, steps=steps)
    assert found == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == kinds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generated_code_trains_as_the_model_does():
    """Most of its time is the C++ compiler's."""
    spec = SPEC.updated({"layers": ["ME", "*-"], "engram": [], "mtp": None})
    expected = train(build_model(spec, seed=0), steps=4)
    model = build_model(spec, seed=0)
    compile_layers(model, whole=True)
    assert train(model, steps=4) == pytest.approx(expected, rel=1e-5)
    assert not counters["graph_break"]

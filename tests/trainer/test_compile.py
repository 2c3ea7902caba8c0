"""Layers under torch.compile: one graph for each kind, no recompilation over many packed batches, the same numbers."""

import pytest
import torch
import torch._dynamo
from bounds import below
from torch._dynamo.utils import counters

from trainer import compiled
from trainer.model import compiling
from trainer.model.compiling import compile_layers
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.recomputing import set_policy
from trainer.runtimespec import RecomputeSpec

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
    """Rows split randomly into documents, so that batches differ in their number, and in the chosen experts."""
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
    """What dynamo captures does not depend on the backend; this one generates no code, so that it is quick."""
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


@pytest.mark.parametrize("policy", ["sqrt", RecomputeSpec(every=2)], ids=str)
def test_layers_that_are_recomputed_in_part_compile(policy):
    expected = train(build_model(SPEC, seed=0), steps=2)
    model = build_model(SPEC, seed=0)
    set_policy(model, policy)
    compile_layers(model, whole=True, backend="aot_eager")
    assert train(model, steps=2) == pytest.approx(expected, rel=1e-5)


def one_layer(symbols: str, shared_width: int = 0) -> ModelSpec:
    """Five experts are not a multiple of a vector's width."""
    engram = [{**SPEC.engram[0].model_dump(), "layer": 0}] if "N" in symbols else []
    moe = {"num_experts": 5, "shared_width": shared_width}
    return SPEC.updated({"layers": [symbols], "engram": engram, "moe": moe, "mtp": None})


def decoder(symbols: str) -> ModelSpec:
    """What the hybrid lacks: norms and biases in attention, rotations, gates, a softmax router, tied embeddings."""
    changes = {
        "attention": {"rope_theta": 1e4, "qk_norm": True, "bias": True},
        "mlp": {"activation": "swiglu", "bias": True},
        "moe": {"activation": "swiglu", "scores": "softmax", "balance_loss_weight": 0.01},
        "tied_embedding": True,
    }
    return one_layer(symbols, shared_width=32).updated(changes)


def gradients(model: HybridModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = model(*next(batches(1)))
    (output.ce_sum + output.aux_sum).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(
    spec: ModelSpec,
    *,
    dtype: torch.dtype | None = None,
    policy: str = "none",
    rel: float = 1e-4,
    backend: str = "inductor",
):
    """Of compiled layers, by default by the compiler that is used in training, and of the model as it is."""
    expected = gradients(build_model(spec, seed=0), dtype)
    model = build_model(spec, seed=0)
    set_policy(model, policy)
    compile_layers(model, whole=True, backend=backend)
    found = gradients(model, dtype)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    for name, gradient in expected.items():
        below((found[name] - gradient).norm(), rel * gradient.norm(), name)


def test_generated_code_reads_after_it_has_scattered():
    """The gradient of chosen scores and that of all scores; only torch, so that it shows where an error comes from."""
    compiling._keep_mutations_in_order()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(128, 5, generator=generator).argsort(1)[:, :2].contiguous()
    shapes = [(2, 5), (2, 64, 1), (2, 64, 5), (128, 3), (3, 2), (2, 64, 5)]
    inputs = [torch.rand(shape, generator=generator) + 0.5 for shape in shapes]

    def function(f, total, divided, left, right, scores):
        part = f.unsqueeze(1).expand(2, 64, 5) / 64
        of_all = part / total - (part * divided).sum(2, keepdim=True)
        of_chosen = torch.zeros(128, 5).scatter_add(-1, chosen, left @ right)
        return (of_all + of_chosen.view(2, 64, 5)) * (scores * (1 - scores))

    torch.testing.assert_close(torch.compile(function)(*inputs), function(*inputs))


def test_backward_passes_are_captured_outside_of_autocast():
    """Else what is FP32 in a model under BF16, router and scan, would have gradients by BF16 products: 2e-3 away.

    The product alone: what is rounded to BF16 in a whole layer may be rounded elsewise in compiled code.
    """
    compile_layers(build_model(one_layer("E"), seed=0), backend="aot_eager")  # the setting is that of the process
    x = torch.randn(64, 64)

    def product(weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ weight

    found = []
    for function in (product, torch.compile(product, backend="aot_eager")):
        weight = torch.eye(64).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(weight)
        y.backward(x)
        found.append(weight.grad)
    below((found[1] - found[0]).norm(), 1e-5 * found[0].norm())


def rarely(*values) -> pytest.param:
    return pytest.param(*values, marks=pytest.mark.proof)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("symbols", "shared_width"),
    [
        rarely("NE", 0),
        rarely("ME*-", 32),
        *(rarely(symbols, 0) for symbols in ("M", "*", "-", "N", "E")),
        *(rarely(symbols, 0) for symbols in ("ME", "MM", "EE", "*-", "M*", "*E", "E-", "NM", "N*-")),
        *(rarely(symbols, 32) for symbols in ("E", "ME", "*E", "E-", "NE")),
    ],
)
def test_generated_code_has_the_gradients_of_every_kind_of_layer(symbols: str, shared_width: int):
    assert_same_gradients(one_layer(symbols, shared_width))


@pytest.mark.slow
@pytest.mark.parametrize("symbols", ["ME*-", rarely("*-"), rarely("*E")])
def test_generated_code_has_the_gradients_of_a_decoder(symbols: str):
    """The usual case has Mamba-2 too and so every kind but Engram; the plain options are in the others."""
    assert_same_gradients(decoder(symbols))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "symbols", "shared_width"),
    [
        *[("selective", "*E", 0), ("full", "NE", 32), rarely("full", "*E", 0)],
        *[rarely("selective", "ME", 32), rarely("full", "ME", 32)],
    ],
)
def test_generated_code_recomputes_what_it_differentiates(policy: str, symbols: str, shared_width: int):
    """Whole layers: what is generated without a policy, and again. The only usual case of Engram and a plain router."""
    assert_same_gradients(one_layer(symbols, shared_width), policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("symbols", "rel"),
    [("*-", 0.03), rarely("N", 0.15), *(rarely(symbols, compiled.TOLERANCE["bf16"]) for symbols in ("E", "ME"))],
)
def test_generated_code_differs_in_bf16_by_less_than_the_check_of_a_run_allows(symbols: str, rel: float):
    """It rounds less often, so about one in 128 tokens chooses another expert."""
    assert_same_gradients(one_layer(symbols), dtype=torch.bfloat16, rel=rel)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.timeout(900)
def test_generated_code_trains_as_the_model_does():
    """Most of its time is the C++ compiler's."""
    spec = SPEC.updated({"layers": ["ME", "*-"], "engram": [], "mtp": None})
    expected = train(build_model(spec, seed=0), steps=4)
    model = build_model(spec, seed=0)
    compile_layers(model, whole=True)
    assert train(model, steps=4) == pytest.approx(expected, rel=1e-5)
    assert not counters["graph_break"]

"""Activation checkpointing: the same gradients, and the bytes that trainer.arithmetic.activations computes."""

import pytest
import torch

from manifests.spec import JobSpec, load_job
from trainer.arithmetic.activations import activations, regions
from trainer.arithmetic.memory import step_memory
from trainer.errors import SpecError
from trainer.fp8.convert import convert
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.ops import wide
from trainer.parallel.layout import Layout
from trainer.recomputing import set_policy
from trainer.runtimespec import RecomputeSpec, Recomputing, RuntimeSpec
from trainer.spec import Fp8Spec
from trainer.specbase import parse

POLICIES = ["none", "selective", "full"]
SOME_LAYERS = ["sqrt", {"every": 2}, {"layers": 2}]
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


def recomputing(policy: str | dict) -> Recomputing:
    return parse(RuntimeSpec, {"activation_checkpointing": policy}).activation_checkpointing


@pytest.mark.parametrize("spec", [SPEC, DECODER], ids=["hybrid", "decoder"])
@pytest.mark.parametrize("policy", ["selective", "full", *SOME_LAYERS], ids=str)
def test_gradients_and_loads_are_those_without_to_the_last_bit(policy, spec):
    model = build_model(spec, seed=0)
    expected = step(model, 2, 96)
    set_policy(model, recomputing(policy))
    found = step(model, 2, 96)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found["loads"].sum(1).eq(2 * 96 * spec.moe.top_k).all()


def attending(spec: ModelSpec) -> set[int]:
    """The layers with attention, those of multi-token prediction after the others."""
    layers = [*spec.layers, *([spec.mtp.layer] * spec.mtp.depth if spec.mtp else [])]
    return {number for number, symbols in enumerate(layers) if "*" in symbols}


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


@pytest.mark.parametrize("policy", [*POLICIES, *SOME_LAYERS], ids=str)
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
    model, policy = build_model(spec, seed=0), recomputing(policy)
    set_policy(model, policy)
    measured = (kept_bytes(model, 6, dtype) - kept_bytes(model, 2, dtype)) / (4 * 128)
    if layers in ("all", "*"):  # the documents hold their masks, whether autograd sees them or not
        again = policy == "full" or {n for part in regions(spec, policy) for n in range(*part)} >= attending(spec)
        measured += 128 * (1 + (dtype or torch.float32).itemsize * again)
    assert activations(spec, 128, policy, precision).kept == pytest.approx(measured, rel=0.03)


def test_policies_keep_less_and_less_of_the_large_presets():
    for preset in ("h100-4b", "h100-4b-interleaved"):
        none, selective, full = (activations(load_job(preset).train.model, 4096, policy) for policy in POLICIES)
        assert full.peak < 0.75 * selective.peak and selective.peak < 0.75 * none.peak
        assert not none.recomputed and len(selective.recomputed) >= 3 and full.recomputed


@pytest.mark.parametrize("policy", ["selective", "full", "sqrt"])
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


def job(policy: object, **changes: object) -> JobSpec:
    return load_job("h100-4b", {"train": {"runtime": {"activation_checkpointing": policy}, **changes}})


@pytest.mark.parametrize("gib", [56, 60, 70, 79])
def test_a_budget_recomputes_as_few_layers_as_fit(gib: int):
    """By every number of layers in turn."""
    spec, said = job({"budget_gib": gib}).fitted()
    count = spec.runtime.activation_checkpointing.layers

    def total(layers: int) -> float:
        return step_memory(job({"layers": layers}).train_spec(), Layout()).total / 2**30

    assert total(count) <= gib < total(count - 1)
    assert said == [
        f"train.runtime.activation_checkpointing.budget_gib {gib}: {count} of 52 layers are recomputed; a step then "
        f"takes {total(count):.1f} of {gib}.0 GiB on each rank"
    ]


def test_a_budget_of_the_gpu_and_one_that_needs_nothing():
    small, large = (job({"budget_gib": "auto"}).updated({"cluster": {"gpu_memory_gib": gib}}) for gib in (80, 141))
    assert small.fitted_spec().runtime.activation_checkpointing.layers > 5
    assert large.fitted_spec().runtime.activation_checkpointing == "none" and large.run_name == small.run_name


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ({"budget_gib": 10}, {}, "a step takes .* at the least, with .* and there are 10.0; raise it, or lower"),
        ({"budget_gib": 60}, {"batch": {"micro_batch_rows": "auto"}}, "would each decide by the other"),
        ({"every": 1}, {}, "activation_checkpointing.every: .*greater than or equal to 2"),
        ({"layers": 0}, {}, "activation_checkpointing.layers: "),
        ({"every": 2, "layers": 3}, {}, "write one of every, layers and budget_gib .these are 2: every, layers"),
        ({}, {}, "write one of every, layers and budget_gib .there is none"),
        ({"each": 2}, {}, "activation_checkpointing.each: unknown field"),
        ("some", {}, "activation_checkpointing: "),
    ],
)
def test_wrong_policies_are_one_line(policy: object, changes: dict, message: str):
    with pytest.raises(SpecError, match=message) as error:
        job(policy, **changes)
    assert str(error.value).count("\n") == 0 and "constrained" not in str(error.value)


def test_groups_of_layers_are_not_for_fsdp():
    with pytest.raises(SpecError, match="sqrt: FSDP2 gathers layers one by one"):
        job("sqrt", parallel={"data": "fsdp"}).updated({"cluster": {"gpus_per_node": 2}})


def test_the_root_of_the_layers_is_more_than_every_layer_for_the_large_preset():
    """A layer keeps far more than its input, so a group that exists again costs more than the inputs it saves."""
    full, root = (step_memory(job(policy).train_spec(), Layout()).total for policy in ("full", "sqrt"))
    assert full < root < step_memory(job("selective").train_spec(), Layout()).total


def test_the_peak_is_the_largest_of_what_exists_at_once():
    """With every layer alone the arithmetic of groups is that of `full`."""
    everything = activations(SPEC, 128, "full", "fp32")
    count = len(SPEC.layers) + SPEC.mtp.depth
    alone = activations(SPEC, 128, RecomputeSpec(layers=count), "fp32")
    assert alone.kept == everything.kept and alone.peak <= everything.peak

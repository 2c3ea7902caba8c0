"""LoRA: only adapters are trained, as by a plain loop over torch.optim.AdamW; in an export they are merged."""

from __future__ import annotations

import copy
import io
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro
import parallel_ranks
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef

from trainer import agreement, export
from trainer.arithmetic.describe import describe, render
from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.memory import step_memory, training_memory
from trainer.begin import begun_with
from trainer.checkpoints import checkpoint
from trainer.errors import SpecError
from trainer.fields import stored, version_of
from trainer.lora import is_adapter
from trainer.model import lora
from trainer.model.compiling import compile_layers
from trainer.model.hybrid import HybridModel, build_model
from trainer.model.lora import Stack, merge
from trainer.modelspec import ModelSpec
from trainer.ops.experts_grouped import experts_grouped
from trainer.optim import build_optimizers
from trainer.parameters import parameters
from trainer.preflight.ranks import Place
from trainer.pretrained import find, refuse_misfit
from trainer.recomputing import set_policy
from trainer.report.settings import hyperparameters
from trainer.runtimespec import RecomputeSpec
from trainer.spec import BackendsSpec, OptimizerSpec, TrainSpec
from trainer.specbase import deep_merge, parse
from trainer.trained import load_trained

HYBRID: dict[str, Any] = {
    "vocab_size": 64,
    "hidden": 32,
    "layers": ["ME", "N", "*-"],
    "mamba": {"num_heads": 2, "head_dim": 16, "d_state": 16, "chunk_size": 16},
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
    "moe": {"num_experts": 4, "top_k": 2, "expert_width": 32, "shared_width": 16, "sequence_loss_weight": 0},
    "mlp": {"width": 32},
    "engram": [{"layer": 1, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2, "compress_tokens": False}],
}
DECODER = HYBRID | {
    "layers": ["*-", "*E"],
    "engram": [],
    "attention": {**HYBRID["attention"], "rope_theta": 1e4, "qk_norm": True, "bias": True},
    "mlp": {"width": 32, "activation": "swiglu", "bias": True},
    "moe": {"num_experts": 4, "top_k": 2, "expert_width": 16, "activation": "swiglu", "scores": "softmax"},
    "tied_embedding": True,
}
LORA = {"rank": 4, "alpha": 12}


def spec_of(fields: dict[str, Any], lora: dict[str, Any] | None = LORA) -> ModelSpec:
    return parse(ModelSpec, fields | {"lora": lora})


def batch() -> tuple[Tensor, Tensor, Tensor]:
    ids_BT = (torch.arange(2)[:, None] * 5 + torch.arange(48) * 3) % 64
    return ids_BT, (torch.arange(48) > 20).int().expand(2, -1).contiguous(), ids_BT.roll(-1, dims=1)


def adapted(spec: ModelSpec) -> HybridModel:
    """A model whose adapters are not zero."""
    model, generator = build_model(spec, seed=0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("fields", [HYBRID, DECODER], ids=["hybrid", "decoder"])
def test_merged_logits_are_equal(fields: dict[str, Any]):
    model = adapted(spec_of(fields))
    merged = copy.deepcopy(model)
    merge(merged)
    assert merged.state_dict().keys() == build_model(spec_of(fields, None), seed=0).state_dict().keys()
    with torch.no_grad():
        logits_BTV = model(*batch()[:2]).logits_BTV
        torch.testing.assert_close(merged(*batch()[:2]).logits_BTV, logits_BTV, atol=1e-5, rtol=1e-4)
        plain = build_model(spec_of(fields, None), seed=0)(*batch()[:2]).logits_BTV
    assert (plain - logits_BTV).abs().max() > 1e-2, "they did something"


@pytest.mark.parametrize("fields", [HYBRID, DECODER], ids=["hybrid", "decoder"])
def test_ten_steps_are_those_of_a_plain_loop_over_torch(fields: dict[str, Any]):
    """The loop makes W + α/r · B A of every matrix and trains A and B by torch.optim.AdamW."""
    spec = spec_of(fields)
    model, plain = build_model(spec, seed=0), build_model(spec_of(fields, None), seed=0)
    pairs = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if is_adapter(name)}
    base = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    theirs = torch.optim.AdamW(pairs.values(), lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    options = OptimizerSpec.model_validate({"adamw": {"learning_rate": 0.02}})
    ours = build_optimizers(model, options, spec)
    assert list(ours.members) == ["adamw"] and ours.peak_learning_rate == 0.02
    losses = []
    for _ in range(10):
        weights = dict(base)
        for name, down in pairs.items():
            if name.endswith("lora_A"):
                stem = name.removesuffix("lora_A")
                matrix = f"{stem}weight" if stem.endswith(".") else stem.removesuffix("_")
                weights[matrix] = base[matrix] + 3 * pairs[f"{stem}lora_B"] @ down
        expected = functional_call(plain, weights, batch()).ce_sum / 96
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        ours.zero_grad()
        loss = model(*batch()).ce_sum / 96
        loss.backward()
        ours.step()
        losses.append((loss.item(), expected.item()))
    for loss, reference in losses:
        assert loss == pytest.approx(reference, abs=1e-4)
    assert losses[-1][0] < losses[0][0] - 0.3
    for name, parameter in model.named_parameters():
        assert is_adapter(name) or torch.equal(parameter, base[name])


@pytest.mark.parametrize("policy", ["none", "selective", "full", "sqrt", RecomputeSpec(every=2)], ids=str)
@pytest.mark.parametrize("backend", ["grouped", "reference"])
def test_sums_of_experts_are_made_again_for_the_backward_pass(policy: Any, backend: str, monkeypatch):
    spec, made = spec_of(HYBRID), []
    model = build_model(spec, BackendsSpec.model_validate({"experts": backend}), seed=0)
    model.load_state_dict(adapted(spec).state_dict())
    whole = Stack.sum

    def noted(self: Stack, *which: Any) -> Tensor:
        made.append(StorageWeakRef((result := whole(self, *which)).untyped_storage()))
        return result

    monkeypatch.setattr(Stack, "sum", noted)
    set_policy(model, policy)
    loss = model(*batch()).ce_sum
    assert len(made) == 2 and all(storage.expired() for storage in made), "nobody holds them"
    loss.backward()
    assert len(made) > 2
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    monkeypatch.setattr(lora, "saved_tensors_hooks", lambda *_: nullcontext())
    set_policy(model, "none")
    model.zero_grad()
    model(*batch()).ce_sum.backward()
    assert found.keys() == {p.name for p in parameters(spec) if not p.frozen}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=0, rtol=0)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_experts_that_stay_have_no_gradient(needed: tuple[bool, bool]):
    tensors = [torch.randn(*shape) for shape in ((10, 8), (4, 16, 8), (4, 8, 16))]
    chosen = torch.rand(10, 4).topk(2).indices, torch.rand(10, 2)

    def gradients(*needs: bool) -> list[Tensor | None]:
        x_SD, up_EFD, down_EDF = (t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True))
        experts_grouped(x_SD, up_EFD, down_EDF, *chosen).square().sum().backward()
        return [x_SD.grad, up_EFD.grad, down_EDF.grad]

    found, everything = gradients(True, *needed), gradients(True, True, True)
    for gradient, expected, wanted in zip(found, everything, (True, *needed), strict=True):
        assert torch.equal(gradient, expected) if wanted else gradient is None


def test_narrow_products_are_those_of_merged_ones():
    spec = spec_of(HYBRID | {"moe": {**HYBRID["moe"], "top_k": 4}})  # rounding chooses no other expert
    model = adapted(spec)
    merged = copy.deepcopy(model)
    merge(merged)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch()).ce_sum
        assert loss.item() == pytest.approx(merged(*batch()).ce_sum.item(), rel=2e-3)
    loss.backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())


def test_compiled_layers_have_the_same_gradients():
    model = adapted(spec_of(DECODER | {"layers": ["E*"]}))
    loss = model(*batch()).ce_sum
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    set_policy(model, "selective")
    compile_layers(model, backend="aot_eager")
    compiled = model(*batch()).ce_sum
    compiled.backward()
    assert compiled.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-4)


def lora_run(data: Path, directory: Path, name: str, **changes: Any) -> TrainSpec:
    fixed = {
        "model": {"lora": LORA},
        "steps": 3,
        "checkpoint": {"every_steps": 2},
        "optimizer": {"adamw": {"learning_rate": 0.02}},
        "init_from": str(directory / "first"),
    }
    return micro.micro_spec(data, directory / name, **deep_merge(fixed, changes))


def test_runs_train_adapters_alone_and_export_them_merged(micro_data: Path, tmp_path: Path):
    first = micro.micro_spec(micro_data, tmp_path / "first", steps=2)
    alone = lora_run(micro_data, tmp_path, "alone")
    (_, (whole,)) = parallel_ranks.run([first, alone], 1, tmp_path)
    experts = {"parallel": {"expert": 2}, "model": {"lora": {"targets": {"moe": ["up_EFD"]}}}}
    cut = {
        "fsdp": lora_run(micro_data, tmp_path, "fsdp", parallel={"data": "fsdp", "expert": 2}),
        "ddp": lora_run(micro_data, tmp_path, "ddp", parallel={"shard_optimizer": True}),
        "experts": lora_run(micro_data, tmp_path, "experts", **experts),
    }
    half = checkpoint.step_dir(alone.run_dir, 2)
    shutil.copytree(half, checkpoint.step_dir(cut["ddp"].run_dir, 2))  # goes on from there
    parallel_ranks.run(list(cut.values()), 2, tmp_path)
    adapters = sum(p.count for p in parameters(alone.model) if is_adapter(p.name))
    assert whole["state"] == 2 * adapters, "two moments of each adapter and of nothing else"

    begun = load_trained(first, torch.device("cpu")).model.state_dict()
    trained = {name: load_trained(spec, torch.device("cpu")) for name, spec in (cut | {"alone": alone}).items()}
    for model in (found.model for found in trained.values()):
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in begun.items()), "router biases too"
        assert all(tensor.any() for name, tensor in state.items() if name.endswith("lora_B"))
    before = begun_with(alone, torch.device("cpu"), None)
    assert before is not None and all(torch.equal(t, begun.get(n, 0 * t)) for n, t in before.state_dict().items())
    reference = micro.metrics(alone)
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.02
    assert [line["auxiliary"] for line in reference] == [{"router_balance": 0}] * 3
    for name, steps in (("fsdp", reference), ("ddp", reference[2:])):
        for line, expected in zip(micro.metrics(cut[name]), steps, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=2e-6), name
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5), name

    manifest = export.run(alone)
    assert manifest["parameters"] == sum(p.count for p in parameters(first.model))
    merged, _ = export.load(tmp_path / "alone" / "export")
    assert merged.spec == first.model
    ids_BT, seq_idx_BT, _ = batch()
    with torch.no_grad():
        logits_BTV = trained["alone"].model(ids_BT, seq_idx_BT).logits_BTV
        torch.testing.assert_close(merged(ids_BT, seq_idx_BT).logits_BTV, logits_BTV, atol=1e-4, rtol=0)
    refuse_misfit(find(tmp_path / "alone" / "export"), alone.model)
    with pytest.raises(SpecError, match=r"step-00000003 holds adapters .*; export that run, which merges them"):
        refuse_misfit(find(tmp_path / "alone"), alone.model)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"targets": {"attention": ["q_proj", "query"]}},
            r"attention names 'query'; matrices there are q_proj, k_proj",
        ),
        ({"targets": {"moe": ["router"]}}, r"moe names 'router'; matrices there are up_EFD, down_EDF, shared_up"),
        ({"targets": {"engram": ["key_proj"]}}, r"names 'engram'; sections .* are mamba, attention, moe, mlp$"),
        ({"targets": {"atention": ["q_proj"]}}, r"names 'atention'; sections"),
        ({"targets": {}}, "targets names no matrix"),
        ({"rank": 0}, "lora.rank: must be greater than 0"),
        ({"ranks": 4}, "did you mean 'lora.rank'"),
    ],
)
def test_a_target_that_is_not_there_is_one_line(lora: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message) as error:
        spec_of(HYBRID, lora)
    assert "\n" not in str(error.value)


def test_what_does_not_go_together_is_one_line(tmp_path: Path):
    fits = {"model": {"lora": LORA}, "init_from": "somewhere"}
    assert micro.micro_spec(tmp_path, tmp_path, **fits).peak_learning_rate == 2e-3
    for change, message in (
        ({"init_from": None}, "name that model in train.init_from, or remove lora"),
        ({"precision": {"dtype": "fp8"}}, "fp8 does not support adapters"),
        ({"model": {"mtp": {"depth": 1}}}, "mtp needs its own modules trained; remove one of them"),
        ({"model": {"layers": ["N", "N"], "lora": {}}}, "exactly one engram entry"),
        (
            {"model": {"layers": ["M", "N"], "lora": {"targets": {"mlp": ["up"]}}}},
            r"none of its targets \(mlp up\); name",
        ),
        (
            {"optimizer": {"adamw": {"learning_rate": 1e-6}}},
            r"exceeds the peak, train\.optimizer\.adamw\.learning_rate",
        ),
    ):
        with pytest.raises(SpecError, match=message) as error:
            micro.micro_spec(tmp_path, tmp_path, **deep_merge(fits, change))
        assert "\n" not in str(error.value)


def test_fp8_is_not_chosen(monkeypatch: pytest.MonkeyPatch):
    problems = {"te": None, "torch": None}
    monkeypatch.setattr(agreement.precision, "device_capability", lambda device: (9, 0))
    monkeypatch.setattr(agreement.precision, "fp8_problems", lambda *_: problems)
    monkeypatch.setattr(agreement, "_told", lambda world, own: [(Place(0, "here"), own)])
    for adapters, name in ((None, "fp8"), (LORA, "bf16")):
        spec = micro.micro_spec(Path("x"), Path("y"), model={"lora": adapters}, init_from="somewhere")
        chosen = agreement.rung(spec, SimpleNamespace(device=torch.device("cuda")))
        assert chosen.name == name
    assert "te: does not support adapters (train.model.lora)" in chosen.reason


def test_arithmetic():
    """Of adapters of rank r: (in + out)·r elements each; frozen weights have neither gradient nor state, and their
    products take 4 instead of 6 operations."""
    spec, plain = spec_of(DECODER), spec_of(DECODER, None)
    hidden, rank = 32, 4
    attention = sum(rank * (hidden + rows) for rows in (32, 16, 16, 32))
    mlp, expert = rank * (hidden + 64) + rank * (32 + hidden), rank * (hidden + 32) + rank * (16 + hidden)
    adapters, active = 2 * attention + mlp + 4 * expert, 2 * attention + mlp + 2 * expert
    figures = describe(spec, 48)
    assert figures.trained == adapters and figures.total == describe(plain, 48).total + adapters
    multiplied = sum(p.active for p in parameters(plain) if p.multiplies)
    assert flops_per_token(plain, 48) - flops_per_token(spec, 48) == 2 * multiplied - 6 * active
    memory = training_memory(spec)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * figures.total, 4 * adapters, 8 * adapters)
    model = build_model(spec, device="meta", seed=0)
    assert {p.name: p.shape for p in parameters(spec)} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    page = io.StringIO()
    render(figures, Console(file=page, width=120))
    assert "trained (only adapters)" in page.getvalue() and f"{adapters:,}" in page.getvalue()
    # Beside copies of the dense ones' adapters, one layer's experts with their products and the gradient of those, in
    # place of a copy of the experts themselves.
    dense, experts = adapters - 4 * expert, 4 * (hidden * 32 + 16 * hidden)
    fields = {
        "init_from": "x",
        "precision": {"dtype": "bf16"},
        "model": DECODER | {"moe": {**DECODER["moe"], "shared_width": 0}},
    }
    train = micro.micro_spec(Path("x"), Path("y"), **fields)
    narrow = [step_memory(train.updated({"model": {"lora": given}})).copies for given in (None, LORA)]
    assert narrow[1] - narrow[0] == 2 * dense + (2 * 2 + 4) * experts - 2 * experts
    assert ("LoRA", "rank 4, α 12, all matrices of the mixers") in hyperparameters(
        train.updated({"model": {"lora": LORA}})
    )
    assert stored(plain) == {name: value for name, value in stored(spec).items() if name != "lora"}
    assert version_of(spec) == 5

"""Multi-token prediction against the formulas of DeepSeek-V3 (arXiv 2412.19437, §2.2), one document at a time."""

from __future__ import annotations

import json
from pathlib import Path

import micro
import pytest
import torch
from torch import Tensor

from trainer import evaluate, export
from trainer.arithmetic.describe import describe
from trainer.loop import train
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.parameters import parameters

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SPEC = ModelSpec(
    vocab_size=61,
    hidden=24,
    layers=["*-", "*"],
    attention={"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": WIDTH},
    mlp={"width": 40},
    mtp={"depth": 2, "weight": 0.3, "layer": "*-"},
    init_std=0.2,
)
LENGTHS = [1, 9, 2, 3, 14]  # one document shorter than the depth, one as long
MTP_MOE = {"mtp": {"layer": "*E"}}


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """One row; its last document goes on behind the row, so even the last position has a label."""
    generator = torch.Generator().manual_seed(5)
    ids_1T = torch.randint(1, SPEC.vocab_size, (1, sum(LENGTHS)), generator=generator)
    seq_idx_1T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int()[None]
    labels_1T = ids_1T.roll(-1, 1)
    labels_1T[0, torch.tensor(LENGTHS).cumsum(0)[:-1] - 1] = -100
    labels_1T[0, -1] = 7
    return ids_1T, seq_idx_1T, labels_1T


def norm(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return x_TD / (x_TD.square().mean(-1, keepdim=True) + SPEC.norm_eps).sqrt() * weight_D


def block(x_TD: Tensor, p: dict[str, Tensor], at: str, symbols: str) -> Tensor:
    """Attention and squared-ReLU MLP of one document, head by head."""
    for place, symbol in enumerate(symbols):
        w = {name.rpartition(".mixer.")[2]: value for name, value in p.items() if name.startswith(f"{at}.{place}.mix")}
        y_TD = norm(x_TD, p[f"{at}.{place}.norm.weight"])
        if symbol == "-":
            x_TD = x_TD + (y_TD @ w["up.weight"].T).clamp(min=0).square() @ w["down.weight"].T
            continue
        heads = []
        for head in range(HEADS):
            own, shared = slice(head * WIDTH, (head + 1) * WIDTH), head // (HEADS // KV_HEADS) * WIDTH
            q_TW = y_TD @ w["q_proj.weight"][own].T
            k_TW = y_TD @ w["k_proj.weight"][shared : shared + WIDTH].T
            v_TW = y_TD @ w["v_proj.weight"][shared : shared + WIDTH].T
            scores_TT = (q_TW @ k_TW.T / WIDTH**0.5).masked_fill(torch.ones(len(x_TD), len(x_TD)).triu(1) > 0, -1e30)
            heads.append(scores_TT.softmax(-1) @ v_TW)
        x_TD = x_TD + torch.cat(heads, -1) @ w["o_proj.weight"].T
    return x_TD


def oracle(p: dict[str, Tensor], spec: ModelSpec) -> tuple[Tensor, list[Tensor], list[int]]:
    """(Σ cross-entropy, that of each depth, number of labels of each depth), in the dtype of the weights."""
    ids_1T, _, labels_1T = packed()
    total, depths = torch.zeros(()), range(1, spec.mtp.depth + 1)
    sums, counts = [torch.zeros(()) for _ in depths], [0 for _ in depths]
    for x_T, y_T in zip(ids_1T[0].split(LENGTHS), labels_1T[0].split(LENGTHS), strict=True):
        known = [int(token) for token in x_T] + ([int(y_T[-1])] if y_T[-1] >= 0 else [])
        h_TD = p["embedding.weight"][x_T]
        for layer, symbols in enumerate(spec.layers):
            h_TD = block(h_TD, p, f"layers.{layer}", symbols)
        logits_TV = norm(h_TD, p["final_norm.weight"]) @ p["head.weight"].T
        for t in range(len(known) - 1):
            total = total - logits_TV[t].log_softmax(-1)[known[t + 1]]
        for k in depths:
            at, length = f"mtp.{k - 1}", len(x_T) - k  # positions that have a token k ahead of them
            if length < 1:
                break
            token_TD = norm(p["embedding.weight"][x_T[k:]], p[f"{at}.token_norm.weight"])
            both = torch.cat([norm(h_TD[:length], p[f"{at}.hidden_norm.weight"]), token_TD], -1)
            h_TD = block(both @ p[f"{at}.proj.weight"].T, p, f"{at}.layer", spec.mtp.layer)
            logits_TV = norm(h_TD, p[f"{at}.head_norm.weight"]) @ p["head.weight"].T
            for t in range(len(known) - 1 - k):
                sums[k - 1] = sums[k - 1] - logits_TV[t].log_softmax(-1)[known[t + k + 1]]
                counts[k - 1] += 1
    return total, sums, counts


def model_of(spec: ModelSpec = SPEC) -> HybridModel:
    model = build_model(spec, seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_losses_and_gradients_follow_the_formulas():
    model = model_of()
    output = model(*packed())
    copies = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    total, sums, counts = oracle(copies, SPEC)
    assert output.mtp_labels_K.tolist() == counts == [7 + 1 + 13, 6 + 12]
    torch.testing.assert_close(output.ce_sum.double(), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.mtp_ce_sum_K.double(), torch.stack(sums), rtol=1e-5, atol=0)
    assert abs(sums[0] / counts[0] - sums[1] / counts[1]) > 0.01, "the depths must differ to be told apart"

    (output.ce_sum + SPEC.mtp_factor * output.mtp_ce_sum_K.sum()).backward()
    (total + 0.3 / 2 * sum(sums)).backward()
    for name, parameter in model.named_parameters():
        expected = copies[name].grad
        scale = expected.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad.double(), expected, atol=1e-5 * scale, rtol=1e-4, msg=name)


@pytest.mark.usefixtures("quiet_checkpoint_library", "leave_no_traces")
def test_without_weight_the_rest_of_the_model_learns_as_without_modules(micro_data: Path, tmp_path: Path):
    """Bit for bit, over a whole run with its router biases, clipping and checkpoints."""
    losses = []
    for number, mtp in enumerate([None, {"layer": "*E", "weight": 0.0}]):
        spec = micro.micro_spec(micro_data, tmp_path / str(number), steps=5, model={"mtp": mtp})
        assert train(spec) == 0
        losses.append([line["loss"] for line in micro.metrics(spec)])
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("quiet_checkpoint_library", "leave_no_traces")
def test_run_learns_reports_resumes_evaluates_and_exports(micro_data: Path, tmp_path: Path):
    whole = micro.micro_spec(micro_data, tmp_path / "whole", steps=8, model=MTP_MOE)
    assert train(whole) == 0
    lines = micro.metrics(whole)
    assert all(set(line["auxiliary"]) == {"router_balance", "mtp_1"} for line in lines)
    assert lines[-1]["auxiliary"]["mtp_1"] < lines[0]["auxiliary"]["mtp_1"] != lines[0]["loss"]

    parts = [micro.micro_spec(micro_data, tmp_path / "parts", steps=n, model=MTP_MOE) for n in (4, 8)]
    schedule = {"schedule": {"name": "constant"}}  # else it would depend on the number of steps
    for spec in parts:
        assert train(spec.updated(schedule)) == 0
    plain = micro.micro_spec(micro_data, tmp_path / "plain", steps=8, model=MTP_MOE, **schedule)
    assert train(plain) == 0
    resumed, undisturbed = ([line["auxiliary"] for line in micro.metrics(spec)] for spec in (parts[1], plain))
    assert resumed == undisturbed

    result = evaluate.run(whole)
    export.run(whole)
    model, _ = export.load(Path(whole.run_dir) / "export")
    assert "mtp.0.layer.1.mixer.up_EFD" in dict(model.named_parameters()), "the export keeps the modules"
    for parameter in model.mtp.parameters():
        parameter.data.fill_(float("nan"))
    ids_BT = torch.randint(0, micro.VOCAB, (2, 16))
    output = model(ids_BT, torch.zeros_like(ids_BT), ids_BT)
    assert output.ce_sum.isfinite() and output.mtp_ce_sum_K.numel() == 0, "in eval mode no module runs"
    assert json.loads((Path(whole.run_dir) / "eval.json").read_text())["all"] == result["all"]


def test_routers_of_the_modules_are_balanced_too():
    spec = SPEC.updated({"mtp": {"layer": "E"}, "moe": {"num_experts": 4, "top_k": 2, "expert_width": 16}})
    model = model_of(spec)
    output = model(*packed())
    assert output.expert_load_LE.shape == (2, 4) and (output.expert_load_LE.sum(1) == 2 * sum(LENGTHS)).all()
    model.update_router_bias(output.expert_load_LE)
    assert all(module.layer[0].mixer.bias_E.ne(0).any() for module in model.mtp)


@pytest.mark.parametrize("depth", [1, 3])
def test_description_counts_the_modules(depth):
    """A module of config P, `*E`: projection, attention, experts and their router (computed here), and norms."""
    spec = ModelSpec(
        vocab_size=32768,
        hidden=2048,
        layers=["M"],
        mamba={"num_heads": 16, "num_groups": 2},
        attention={"num_heads": 32, "num_kv_heads": 8},
        moe={"num_experts": 64, "top_k": 6, "expert_width": 512},
    )
    with_mtp = spec.updated({"mtp": {"depth": depth}})
    built = {name: tuple(p.shape) for name, p in build_model(with_mtp, device="meta", seed=0).named_parameters()}
    assert {p.name: p.shape for p in parameters(with_mtp)} == built
    plain, figures = describe(spec, 4096), describe(with_mtp, 4096)
    dense = 2048 * 4096 + 2048 * 64 * (32 + 8 + 8 + 32) + 64 * 2048
    expert, norms = 2 * 2048 * 512, 5 * 2048
    assert figures.total - plain.total == depth * (dense + 64 * expert + norms)
    assert figures.active_a1 - plain.active_a1 == depth * (dense + 6 * expert + norms)
    core = 3 * 2 * 4096 * 32 * 64
    more = 6 * (dense + 6 * expert + 32768 * 2048) + core
    assert figures.flops_per_token - plain.flops_per_token == depth * more
    assert sum(row.params for row in figures.rows) == figures.total
    assert sum(row.flops_per_token for row in figures.rows) == figures.flops_per_token


@pytest.mark.parametrize(("layer", "why"), [("N", "drop N"), ("X", "mtp.layer is 'X'"), ("E", "'moe' is missing")])
def test_layers_that_cannot_be_are_refused(layer, why):
    with pytest.raises(ValueError, match=why):
        SPEC.updated({"mtp": {"layer": layer}})

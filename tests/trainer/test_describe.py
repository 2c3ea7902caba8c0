"""The arithmetic of `describe` against the modules that are really built, and against published counts."""

import io
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from manifests.spec import load_job
from trainer import parity
from trainer.describe import describe, render
from trainer.flops import core_flops_per_token, matrix_flops_per_token, parameters
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.optim import build_optimizers
from trainer.spec import BackendsSpec, OptimizerSpec

PRESETS = ["tiny", "small", "h100-4b", "h100-4b-interleaved"]


def preset_model(name: str) -> ModelSpec:
    return load_job(name).train.model


@pytest.mark.parametrize("preset", PRESETS)
def test_names_shapes_and_total_equal_the_built_module(preset):
    spec = preset_model(preset)
    started = time.monotonic()
    model = build_model(spec, device="meta", seed=0)
    assert time.monotonic() - started < 20
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {p.name: p.shape for p in parameters(spec)} == built
    assert describe(spec, 4096).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", ["h100-4b", "h100-4b-interleaved"])
def test_large_presets_are_4_2_billion_with_0_6_active(preset):
    figures = describe(preset_model(preset), 4096)
    assert figures.total == pytest.approx(4.2e9, rel=0.01)
    assert figures.active_a1 == pytest.approx(0.6e9, rel=0.01)
    assert figures.active_a2 - figures.active_a3 == 2 * 32768 * 2048


def test_counts_reproduce_nemotron_3_nano():
    """NVIDIA publishes 31.6B parameters, 3.2B active, 3.6B with embeddings."""
    pattern = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    nano = ModelSpec(
        vocab_size=131072,
        hidden=2688,
        layers=list(pattern),
        mamba={"num_heads": 64, "head_dim": 64, "d_state": 128, "num_groups": 8},
        attention={"num_heads": 32, "num_kv_heads": 2, "head_dim": 128},
        moe={"num_experts": 128, "top_k": 6, "expert_width": 1856, "shared_width": 3712},
    )
    figures = describe(nano, 8192)
    billions = [round(count / 1e9, 1) for count in (figures.total, figures.active_a1, figures.active_a2)]
    assert billions == [31.6, 3.2, 3.6]


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_add_up(preset):
    figures = describe(preset_model(preset), 1024)
    assert sum(row.params for row in figures.rows) == figures.total
    assert sum(row.active for row in figures.rows) == figures.active_a1
    assert sum(row.flops_per_token for row in figures.rows) == figures.flops_per_token


@pytest.mark.parametrize("layer", ["M", "*", "-"])
def test_flops_are_those_that_torch_counts(layer):
    """torch counts the matrix products of a real forward and backward pass."""
    tiny = preset_model("tiny")
    spec = tiny.updated({"layers": [layer], "engram": [], "mamba": {"num_heads": 8, "num_groups": 2}})
    length = 256
    model = build_model(spec, BackendsSpec(attention="reference"), seed=0)
    ids_BT = torch.randint(0, spec.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(ids_BT, torch.zeros(2, length, dtype=torch.int32), ids_BT).ce_sum.backward()
    counted = counter.get_total_flops() / ids_BT.numel()
    weights, core = matrix_flops_per_token(parameters(spec)), core_flops_per_token(spec, layer, length)
    if layer == "*":
        core *= 2  # the reference computes both halves of the causal square, of which one is useful
    assert counted - weights == pytest.approx(core, rel=0.06)


def test_memory_of_states_is_what_the_optimizers_hold():

    tiny = preset_model("tiny")
    spec = tiny.updated({"engram": [{**tiny.engram[0].model_dump(), "compress_tokens": False}]})
    model = build_model(spec, seed=0)
    optimizers = build_optimizers(model, OptimizerSpec(), spec)
    ids_BT = torch.randint(0, spec.vocab_size, (1, 64))
    model(ids_BT, torch.zeros(1, 64, dtype=torch.int32), ids_BT).ce_sum.backward()
    optimizers.step()
    held = sum(
        tensor.nbytes
        for optimizer in optimizers.members.values()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    )
    assert held == pytest.approx(describe(spec, 64).memory.optimizer, rel=0.001)


def test_render_shows_every_layer_and_the_totals():
    console = Console(width=140, record=True, file=io.StringIO())
    figures = describe(preset_model("tiny"), 256)
    render(figures, console)
    text = console.export_text()
    assert f"{figures.total:,}" in text and f"{figures.active_a1:,}" in text
    assert text.count("experts") == 7 and "Engram" in text  # two of them are backends of the operation


def test_render_calls_a_kernel_without_a_record_unproven(monkeypatch):
    def lines() -> dict[str, str]:
        console = Console(width=140, record=True, file=io.StringIO())
        render(describe(preset_model("tiny"), 256), console)
        rows = [[cell.strip() for cell in line.split("│")] for line in console.export_text().splitlines()]
        return {row[2]: row[3] for row in rows if len(row) == 5 and row[1] == "attention"}

    assert "cpu" in lines()["sdpa"] and lines()["flash_attn"] == "nowhere yet: unproven"
    record = replace(parity.committed()[0], op="attention", backend="flash_attn", device_class="sm_90", passed=True)
    monkeypatch.setattr(parity, "committed", lambda: (record,))
    assert lines()["flash_attn"] == "sm_90" and lines()["sdpa"] == "nowhere yet: unproven"

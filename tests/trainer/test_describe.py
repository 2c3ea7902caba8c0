"""The arithmetic of `describe` against real modules, and against published counts."""

import io
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from nemotron_oracle import nemotron_for
from qwen_oracle import qwen_for
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from manifests.spec import load_job, preset_names
from trainer import parity
from trainer.arithmetic.describe import describe, render, render_memory
from trainer.arithmetic.flops import core_flops_per_token, matrix_flops_per_token
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.optim import build_optimizers
from trainer.parameters import parameters
from trainer.spec import BackendsSpec, OptimizerSpec

PRESETS = preset_names()


def preset_model(name: str) -> ModelSpec:
    return load_job(name).train.model


@pytest.mark.parametrize("preset", PRESETS)
def test_names_shapes_and_total_equal_the_built_module(preset):
    spec = preset_model(preset)
    started = time.process_time()  # others' work on the machine does not count
    model = build_model(spec, device="meta", seed=0)
    assert time.process_time() - started < 20
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {p.name: p.shape for p in parameters(spec)} == built
    assert describe(spec, 4096).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", ["h100-4b", "h100-4b-interleaved"])
def test_large_presets_are_4_2_billion_with_0_6_active(preset):
    figures = describe(preset_model(preset), 4096)
    assert figures.total == pytest.approx(4.2e9, rel=0.01)
    assert figures.active_a1 == pytest.approx(0.6e9, rel=0.01)
    assert figures.active_a2 - figures.active_a3 == 2 * 32768 * 2048


def primes_from(start: int, count: int) -> list[int]:
    sieve = bytearray([1]) * (start + 2000)
    for n in range(2, int(len(sieve) ** 0.5) + 1):
        sieve[n * n :: n] = bytes(len(range(n * n, len(sieve), n)))
    return [n for n in range(start, len(sieve)) if sieve[n]][:count]


@pytest.mark.parametrize(
    ("preset", "mambas", "heads", "groups", "expert", "mlps", "orders_of"),
    [("h100-4b", 42, 8, 1, 256, 8, (512, 512)), ("h100-4b-interleaved", 22, 16, 2, 512, 0, (640, 384))],
)
def test_parts_of_the_large_presets_by_hand(preset, mambas, heads, groups, expert, mlps, orders_of):
    """Every part from its widths at hidden 2048: 64 experts, 8 attentions of 32 and 8 heads, 8 tables an order."""
    d, inner, state = 2048, heads * 64, groups * 128
    conv = inner + 2 * state
    mamba = d + d * (2 * inner + 2 * state + heads) + 5 * conv + 3 * heads + inner + inner * d
    experts, router = 64 * 2 * d * expert, 64 * d
    attention, mlp = d + 2 * d * 2048 + 2 * d * 512, d + 2 * d * 512
    engrams = [
        sum(primes_from(rows, 8 * orders)) * (width // 8) + 2 * orders * width * d + 7 * d
        for rows, orders, width in ((200_000, 2, orders_of[0]), (500_000, 3, orders_of[1]))
    ]
    figures = describe(preset_model(preset), 4096)
    found: dict[str, int] = {}
    for row in figures.rows:
        found[row.kind] = found.get(row.kind, 0) + row.params
    assert found.pop("Engram") == sum(engrams)
    assert found.pop("MLP", 0) == mlps * mlp
    assert found == {
        "embedding": 32768 * d,
        "LM head": 32768 * d,
        "final norm": d,
        "Mamba-2": mambas * mamba,
        "experts": mambas * (d + experts + router),
        "attention": 8 * attention,
    }
    tables = sum(engrams) - sum(2 * n * w * d + 7 * d for n, w in zip((2, 3), orders_of, strict=True))
    unused = mambas * experts * 58 // 64
    assert figures.active_a1 == figures.total - 32768 * d - tables - unused
    scan = mambas * (groups * 2 * 128 * 128 + heads * (2 * 128 * 64 + 4 * 128 * 64))
    vectors = mambas * (2 * d + 5 * conv + 3 * heads + inner) + 8 * d + 14 * d + d + (8 * d if mlps else 0)
    assert figures.flops_per_token == 6 * (figures.active_a1 - vectors) + 3 * (scan + 8 * 2 * 4096 * 2048)


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


@pytest.mark.parametrize(
    ("preset", "published", "theirs"),
    [
        ("qwen3-30b-a3b", {"total": 30.5, "without embeddings": 29.9}, qwen_for),
        ("nemotron-3-nano", {"total": 31.6}, nemotron_for),
        ("dual-h100-dense", {}, qwen_for),
    ],
)
def test_presets_have_the_published_sizes_and_those_of_transformers(preset, published, theirs):
    """Billions as their reports give them, and to the last parameter the model that transformers builds."""
    spec = preset_model(preset)
    figures = describe(spec, 4096)
    with torch.device("meta"):
        assert figures.total == sum(p.numel() for p in theirs(spec).parameters())
    found = {"total": figures.total, "without embeddings": figures.total - 2 * spec.vocab_size * spec.hidden}
    for name, billions in published.items():
        assert found[name] / 1e9 == pytest.approx(billions, rel=0.005), name


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_add_up(preset):
    figures = describe(preset_model(preset), 1024)
    assert sum(row.params for row in figures.rows) == figures.total
    assert sum(row.active for row in figures.rows) == figures.active_a1
    assert sum(row.flops_per_token for row in figures.rows) == figures.flops_per_token


DECODER = {"attention": {"qk_norm": True, "rope_theta": 1e4}, "mlp": {"activation": "swiglu"}, "tied_embedding": True}


@pytest.mark.parametrize(("layer", "changes"), [("M", {}), ("*", {}), ("-", {}), ("*", DECODER), ("-", DECODER)])
def test_flops_are_those_that_torch_counts(layer, changes):
    """torch counts the matrix products of a real forward and backward pass."""
    tiny = preset_model("tiny")
    spec = tiny.updated({"layers": [layer], "engram": [], "mamba": {"num_heads": 8, "num_groups": 2}, **changes})
    length = 256
    model = build_model(spec, BackendsSpec(attention="reference"), seed=0)
    ids_BT = torch.randint(0, spec.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(ids_BT, torch.zeros(2, length, dtype=torch.int32), ids_BT).ce_sum.backward()
    counted = counter.get_total_flops() / ids_BT.numel()
    weights, core = matrix_flops_per_token(parameters(spec)), core_flops_per_token(spec, layer, length)
    if layer == "*":
        core *= 2  # the reference computes both halves of the causal square, only one of which is needed
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


@pytest.mark.parametrize("preset", PRESETS)
def test_render_shows_every_layer_whole_on_a_narrow_terminal(preset):
    console = Console(width=80, record=True, file=io.StringIO())
    figures = describe(preset_model(preset), 256)
    render(figures, console)
    text = console.export_text()
    assert f"{figures.total:,}" in text and f"{figures.active_a1:,}" in text and "…" not in text
    layers = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.partition("Weights")[0].splitlines()]
    shown = [(line[0], line[1], line[2], line[3]) for line in layers if len(line) == 5]
    wanted = [(row.layer, row.kind, f"{row.params:,}", f"{row.active:,}") for row in figures.rows]
    assert shown == [("" if layer is None else str(layer), *rest) for layer, *rest in wanted]


def test_render_gives_the_shapes_of_what_is_alike_once():
    console = Console(width=80, record=True, file=io.StringIO())
    render(describe(preset_model("h100-4b"), 256), console)
    text = console.export_text()
    assert (
        text.count("up_EFD(64×256×2048)") == text.count("zxbc_proj(1280×2048)") == text.count("q_proj(2048×2048)") == 1
    )
    engrams = [line.split("│")[2].strip() for line in text.splitlines() if "orders 2.." in line]
    assert engrams == ["2", "26"]


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


def test_memory_is_shown_for_every_policy_with_what_it_recomputes():
    console = Console(width=140, record=True, file=io.StringIO())
    job = load_job("h100-4b")
    render_memory(job.train_spec(), job.layout(), console)
    text = console.export_text()
    weights, total = (next(line for line in text.splitlines() if f" {name} " in line) for name in ("weights", "total"))
    assert weights.count("15.64") == 3, "4.198B × 4 bytes"
    assert [float(cell) for cell in total.split("│")[2:5]] == pytest.approx([87.8, 64.2, 53.3], abs=0.3)
    assert "selective (chosen)" in text and "M: norm, convolution, scan, gated norm" in text


@pytest.mark.parametrize("preset", ["h100-4b", "h100-4b-interleaved"])
def test_building_the_large_model_on_meta_takes_little_memory(preset):
    """Its FP32 weights alone would be 15.6 GiB; most of what is measured is PyTorch itself."""
    code = f"""
from manifests.spec import load_job
from trainer.arithmetic.describe import describe
from trainer.model.hybrid import build_model
model = load_job({preset!r}).train.model
describe(model, 4096)
build_model(model, device="meta", seed=0)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""  # not getrusage: its peak counts from what the process that started this one had
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output) < 2**20, "kB: 1 GiB"

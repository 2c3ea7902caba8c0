"""The roofline against the model's operations, against sums by hand, and against what PyTorch counts."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from manifests.spec import load_job, preset_names
from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.gpus import GPUS, by_device, by_option
from trainer.arithmetic.roofline import Roofline, Work, of_training, render, roofline
from trainer.errors import SpecError
from trainer.fp8.table import conversion_table
from trainer.modelspec import ModelSpec
from trainer.ops.orthogonalise import orthogonalise
from trainer.parameters import parameters
from trainer.spec import Fp8Spec, OptimizerSpec
from trainer.specbase import parse

H100 = by_option("h100")
D, TOKENS = 2048, 4 * 4096  # of the large presets, and of their micro-batches


def of_preset(name: str, changes: dict | None = None, gpu: str = "h100") -> Roofline:
    job = load_job(name, {"train": changes or {}})
    return of_training(job.train_spec(), by_option(gpu), job.cluster.world_size)[0]


def of_model(spec: ModelSpec, micro_batches: int = 1, **options) -> Roofline:
    return roofline(spec, H100, seq_len=64, micro_batch_tokens=128, micro_batches=micro_batches, **options)


@pytest.mark.parametrize("name", preset_names())
def test_operations_of_all_kinds_are_those_of_the_model(name):
    model = load_job(name).train.model
    found = roofline(model, H100, seq_len=1024, micro_batch_tokens=2048, micro_batches=3)
    kinds = sum(work.flops for kind, work in found.rows.items() if not kind.startswith("optimizer"))
    assert kinds == pytest.approx(flops_per_token(model, 1024) * 3 * 2048, rel=1e-12)


@pytest.mark.parametrize("changes", [{"mtp": {"depth": 2}}, {"lora": {"rank": 4}}, {"tied_embedding": True}])
def test_also_with_predictions_ahead_adapters_or_a_tied_head(changes):
    model = load_job("tiny").train.model.updated(changes)
    found = of_model(model)
    kinds = sum(work.flops for kind, work in found.rows.items() if not kind.startswith("optimizer"))
    assert kinds == pytest.approx(flops_per_token(model, 64) * 128, rel=1e-12)
    assert ("adapters" in found.rows) == ("lora" in changes)
    passes, heads = 2 if "lora" in changes else 3, 3 if "mtp" in changes else 1
    assert found.rows["head and loss"].flops == 2 * passes * heads * 128 * model.vocab_size * model.hidden


def test_bytes_of_an_mlp_by_hand():
    """Tensors of N tokens in BF16, each time that a kernel reads or writes one."""
    layers = {"vocab_size": 512, "hidden": 96, "layers": ["-", "-"], "mlp": {"width": 160}}
    found = of_model(parse(ModelSpec, layers), micro_batches=5).rows["MLP"]
    x, wide = 96, 160
    kernels = [
        x + wide + wide,  # up: reads x, writes before and after the activation
        wide + x,  # down: reads the latter, writes y
        x + wide + wide,  # gradient before the activation: reads that of y, and what was there, writes
        wide + x,  # gradient of x
        x + wide,  # gradient of down: that of y, and its input
        wide + x,  # gradient of up
    ]
    activations = 2 * 128 * sum(kernels)
    weights = 2 * x * wide * (2 + 2 + 4 + 4)  # read twice in BF16, its gradient read and written in FP32
    first = 2 * x * wide * 4  # of the first micro-batch it is only written
    assert found.bytes == 2 * (5 * (activations + weights) - first)
    assert found.flops == 2 * 5 * 128 * 6 * 2 * x * wide


def test_bytes_of_attention_by_hand():
    sections = {"attention": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16}}
    spec = parse(ModelSpec, {"vocab_size": 512, "hidden": 96, "layers": ["*"], **sections})
    rows = of_model(spec).rows
    q, kv, sums = 6 * 16, 2 * 16, 6
    core = 2 * (q + kv + kv + q) + 4 * sums + 2 * (q + kv + kv + q + q) + 4 * sums + 2 * (q + kv + kv)
    assert rows["attention core"].bytes == 128 * core
    assert rows["attention core"].flops == 3 * 128 * 2 * 2 * (64 / 2) * q
    outputs = q + 2 * kv
    products = (96 + outputs) * 3 + (q + 96) * 3  # each product reads two of three and writes the third
    assert rows["attention projections"].bytes == 128 * 2 * products + (96 * outputs + q * 96) * (2 + 2 + 4)


def test_experts_of_h100_4b_by_hand():
    """Sorted copies and their sums move 5.4 GB a layer and micro-batch; fused they would move a seventh of it."""
    copies, width = 6, 256
    tensor = copies * TOKENS * D * 2  # copies of the tokens in BF16
    narrow = copies * TOKENS * width * 2
    # Written and read: tokens, results, gradients, tokens again, gradients of copies; some are read twice.
    copied = 11 * tensor + 5 * (TOKENS * D * 2) + 13 * narrow
    assert copied == pytest.approx(5.4e9, rel=0.01)
    page = io.StringIO()
    render(of_preset("h100-4b"), "h100-4b", Console(file=page, width=200))
    assert "0.8 GB as counted here, 5.4 GB where tokens are copied" in page.getvalue()
    fused = 6 * (TOKENS * D * 2) + 8 * narrow
    weights, micro_batches = 64 * 2 * D * width, 32
    expected = micro_batches * (fused + weights * (2 + 2 + 8)) - 4 * weights
    assert of_preset("h100-4b").rows["experts"].bytes == 42 * expected


def test_what_limits_a_kind():
    work = Work(flops=989e12, bytes=3.35e12)
    assert work.seconds(H100) == 1.0 and work.limit(H100) == "memory"
    work.add(flops=1e12)
    assert work.limit(H100) == "compute" and work.seconds(H100) == pytest.approx(990 / 989)
    rows = of_preset("h100-4b-interleaved").rows
    assert rows["experts"].limit(H100) == "compute" and rows["norms and additions"].limit(H100) == "memory"


def test_fp8_products_are_counted_by_their_own_peak():
    spec = load_job("small").train.model
    fp8 = Fp8Spec(bf16_end_layers=0)
    converted = [row.name for row in conversion_table(spec, fp8) if row.converted]
    plain, narrow = of_model(spec), of_model(spec, precision="fp8", converted=converted)
    in_fp8 = sum(6 * p.active for p in parameters(spec) if p.name in converted) * 128
    assert sum(work.fp8_flops for work in narrow.rows.values()) == in_fp8
    assert narrow.rows["router"].fp8_flops == narrow.rows["head and loss"].fp8_flops == 0
    assert narrow.rows["experts"].compute_seconds(H100) == pytest.approx(
        plain.rows["experts"].flops / H100.fp8_flops, rel=1e-12
    )
    assert narrow.rows["experts"].bytes < plain.rows["experts"].bytes
    assert narrow.seconds < plain.seconds and narrow.model_flops == plain.model_flops


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_muons_operations_are_those_that_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalise(torch.randn(1, *shape), steps=5)
    spec = parse(ModelSpec, {"vocab_size": 16, "hidden": 24, "layers": ["-"], "mlp": {"width": 32}})
    assert of_model(spec).rows["optimizer: Muon"].flops == 2 * counter.get_total_flops()  # up and down
    adamw = of_model(spec, optimizer=parse(OptimizerSpec, {"name": "adamw"})).rows
    assert "optimizer: Muon" not in adamw
    matrices, norms = 2 * 24 * 32, 2 * 24  # weights, gradients and two moments in FP32, and the BF16 copy
    assert adamw["optimizer: AdamW"].bytes == 28 * (matrices + norms + 2 * 16 * 24) + 2 * (matrices + 16 * 24)


def test_the_bound_of_a_step_is_the_sum():
    found = of_preset("h100-4b-interleaved")
    assert found.tokens == 524288
    assert found.tokens_per_second == pytest.approx(524288 / sum(w.seconds(H100) for w in found.rows.values()))
    assert found.mfu == pytest.approx(found.tokens_per_second * found.model_flops / 524288 / 989e12)
    assert 0.5 < found.mfu < 1 and found.tokens_per_second > of_preset("h100-4b").tokens_per_second
    assert of_preset("h100-4b-interleaved", gpu="h200").seconds < found.seconds
    assert of_preset("dual-h100-dense").tokens == 524288 // 2


def test_the_table_fits_a_terminal():
    page = io.StringIO()
    render(of_preset("h100-4b"), "a step", Console(file=page, width=80))
    text = page.getvalue()
    assert "…" not in text and re.search(r"At most 17\d,\d{3} tokens/s on each GPU, MFU 7\d%", text)
    assert max(map(len, text.splitlines())) <= 80


def test_devices_are_found_by_name():
    for device, name in {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H100 NVL": "h100-nvl",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA L4": "l4",
    }.items():
        found = by_device(device)
        assert found is not None and found.name == name
    assert by_device("NVIDIA GeForce RTX 2080 Ti") is None
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert by_option("RTX 4090") is by_option("rtx_4090")


def test_what_has_no_roofline_is_said_in_one_line():
    with pytest.raises(SpecError, match=r"--gpu h300: not known; known are h100-pcie, .*t4$"):
        by_option("h300")
    with pytest.raises(SpecError, match=r"train\.precision\.dtype is fp32; write bf16, fp8 or auto"):
        of_preset("tiny", {"precision": {"dtype": "fp32"}})
    with pytest.raises(SpecError, match="--gpu a100: it has no FP8 products"):
        of_preset("small", {"precision": {"dtype": "fp8"}}, "a100")

"""The comparison that writes FP8 parity records: it must accept correct results and reject slightly wrong ones.

torch's tensor-wise products also run on a CPU, which accepts more than a GPU: enough to exercise the comparison.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from bounds import below

from trainer import parity
from trainer.fp8 import check, gemm
from trainer.fp8.convert import convert
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.spec import Fp8Spec

CPU = torch.device("cpu")
MODEL = ModelSpec(
    vocab_size=64, hidden=32, layers=["E"], moe={"num_experts": 4, "top_k": 2, "expert_width": 32, "shared_width": 16}
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SHAPES", ((64, 128, 256), (20, 256, 128)))


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_torch_agrees_with_the_emulation(recipe):
    record = check.compare("linear", Fp8Spec(recipe=recipe, implementation="torch"), CPU)
    assert record.passed
    below(record.forward_error, 0.005)
    below(record.backward_error, 0.005)
    assert (record.op, record.backend, record.variant, record.device_class) == ("linear", "torch", recipe, "cpu")


@pytest.mark.parametrize("wrong", [1.05, float("nan")])
def test_a_product_that_is_wrong_fails(monkeypatch, wrong):
    monkeypatch.setitem(gemm.PRODUCTS, "torch", lambda *a, **k: gemm.product_emulated(*a, **k) * wrong)
    assert not check.compare("linear", Fp8Spec(implementation="torch"), CPU).passed


def test_transformer_engine_is_compared_where_it_takes_the_number_of_tokens():
    """It refuses 20; torch pads."""
    assert [tokens for tokens, _, _ in check.shapes(Fp8Spec(implementation="te"))] == [64]
    assert [tokens for tokens, _, _ in check.shapes(Fp8Spec(implementation="torch"))] == [64, 20]


def test_a_kernel_that_refuses_is_a_line_and_the_others_go_on(monkeypatch, capsys):
    """With any exception: Triton's errors are not RuntimeErrors."""
    file = Path(__file__).parents[2] / "benchmarks" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity_benchmark", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark.fp8, "problem", lambda *_: None)

    def refuse(op: str, fp8: Fp8Spec, device: torch.device) -> parity.Record:
        raise ValueError(f"{fp8.recipe} takes no such tensor\nat all")

    monkeypatch.setattr(benchmark.fp8, "compare", refuse)
    monkeypatch.setattr(sys, "argv", ["parity", "--ops", "linear", "--device", "cpu"])
    assert benchmark.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("FAILED: ")[1] for line in lines[1:3]] == [
        "delayed takes no such tensor",
        "current takes no such tensor",
    ]
    assert len(lines) == 7


def test_every_combination_is_listed_once_and_needs_a_gpu():
    listed = [(op, name, spec.recipe) for op in check.OPERATIONS for name, spec in check.comparisons(op)]
    assert len(set(listed)) == len(listed) == 9
    for op in check.OPERATIONS:
        assert all("no GPU" in check.problem(op, spec, CPU) for _, spec in check.comparisons(op))


def test_experts_need_a_record_of_their_own_where_auto_chose(monkeypatch):
    """Proven linear layers do not prove the grouped product."""
    fp8 = Fp8Spec(implementation="torch", format="e4m3", bf16_end_layers=0)
    proofs: set[str] = set()
    monkeypatch.setattr(parity, "proven", lambda op, *rest: op in proofs)

    def converted(only_proven: bool) -> bool:
        model = build_model(MODEL, seed=0)
        convert(model, MODEL, fp8, CPU, only_proven=only_proven)
        return "Fp8Grouped" in repr(model.layers[0][0].mixer.run_experts)

    assert converted(only_proven=False)
    assert not converted(only_proven=True)
    proofs.add("fp8_experts")
    assert converted(only_proven=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", check.OPERATIONS)
def test_parity_on_this_gpu(op):
    device = torch.device("cuda")
    for implementation, spec in check.comparisons(op):
        if check.problem(op, spec, device) is None:
            record = check.compare(op, spec, device)
            assert record.passed, (implementation, record)

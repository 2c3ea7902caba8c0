"""The comparison at the start of a compiled run: what it finds, its consequences, and that it has no side effects."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

import micro
import pytest
import torch
import torch._dynamo
from bounds import below

from trainer import compiled, precision
from trainer.loop import train
from trainer.model import compiling
from trainer.modelspec import ModelSpec
from trainer.precision import Precision
from trainer.spec import BatchSpec, Fp8Spec, PrecisionSpec, TrainSpec
from trainer.specbase import SpecError

FP32 = precision.resolve(PrecisionSpec(), None)
quick = partial(compiling.compile_layers, backend="aot_eager")  # captured as by the real one, without code of its own


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losing(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]):
    """A compiler whose code computes the same and loses nine tenths of all gradients."""

    def run(*arguments):
        return [
            0.1 * value + 0.9 * value.detach() if value.is_floating_point() else value for value in graph(*arguments)
        ]

    return run


def failing(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]):
    raise RuntimeError("no compiler\nand more")


def run_spec(data: Path, directory: Path, compile: bool | str, layers: tuple[str, ...] = ("ME", "*-")) -> TrainSpec:
    small = {"layers": list(layers), "engram": []}
    runtime = {"compile": compile, "preflight": {"enabled": False}}
    return micro.micro_spec(data, directory / str(compile), steps=4, model=small, runtime=runtime)


def losses(spec: TrainSpec) -> list[float]:
    assert train(spec) == 0
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
    return [line["loss"] for line in micro.metrics(spec)]


def test_every_kind_of_layer_is_compared_once():
    spec = ModelSpec(
        vocab_size=4096,
        hidden=64,
        layers=["N", "ME", "N", "ME", "*-", "ME"],
        mamba={"num_heads": 2, "head_dim": 32},
        attention={"num_heads": 2, "num_kv_heads": 1},
        moe={"num_experts": 8, "top_k": 2, "expert_width": 32},
        mlp={"width": 64},
        engram=[
            {"layer": 0, "rows_per_head": 10**6, "width_per_order": 32},
            {"layer": 2, "rows_per_head": 10**7, "width_per_order": 32},
        ],
        mtp={"depth": 1, "layer": "E"},
    )
    found = compiled.kinds(spec, FP32)
    assert [kind.symbols for kind in found] == ["N", "ME", "*-", "E"]
    alone = found[0].alone(spec)
    assert alone.vocab_size <= 512 and alone.engram[0].rows_per_head <= 1024 and not alone.engram[0].compress_tokens
    in_fp8 = Precision("fp8", torch.bfloat16, False, "", Fp8Spec(implementation="emulated", bf16_end_layers=2))
    both = [(kind.symbols, kind.converted) for kind in compiled.kinds(spec, in_fp8)]
    assert both == [("N", False), ("ME", False), ("N", True), ("ME", True), ("*-", False), ("E", False)]


def test_shapes_are_those_of_the_curriculum_in_its_order(micro_data: Path, tmp_path: Path):
    tokens = micro.micro_spec(micro_data, tmp_path).tokens
    stages = [{"from_tokens": 512, "seq_len": 64}, {"from_tokens": 1024, "weights": {"ko": 1.0}}]
    tokens = tokens.updated({"curriculum": stages})
    batch = BatchSpec(tokens_per_step=256, micro_batch_rows=4)
    assert compiled.shapes(tokens, batch) == [(4, 32), (2, 64)]


def test_what_is_off_most_is_named_and_rounding_of_what_is_almost_nothing_is_not():
    expected = {"the loss": torch.ones(()), "a": torch.ones(4), "b": torch.full((4,), 1e-9)}
    off = expected | {"a": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    assert compiled.furthest(off, expected) == ("a", pytest.approx(0.5))
    below(compiled.furthest(expected | {"b": -expected["b"]}, expected)[1], 1e-5)
    assert compiled.furthest(expected | {"a": torch.full((4,), torch.nan)}, expected) == ("a", math.inf)


@pytest.mark.parametrize(
    ("backend", "reason"), [(losing, "compiled layer ME computes"), (failing, "the compiler fails on layer ME")]
)
def test_wrong_code_ends_the_start_or_is_not_used(
    micro_data: Path, tmp_path: Path, monkeypatch, caplog, leave_no_traces, backend, reason: str
):
    monkeypatch.setattr(compiled, "compile_layers", partial(compiling.compile_layers, backend=backend))
    with pytest.raises(SpecError, match=rf"^train\.runtime\.compile: {reason}.*; write false, or auto.*$") as error:
        train(run_spec(micro_data, tmp_path, True))
    assert "\n" not in str(error.value)
    torch.distributed.destroy_process_group()
    expected = losses(run_spec(micro_data, tmp_path, False))
    caplog.set_level(logging.INFO, logger="trainer")
    assert losses(run_spec(micro_data, tmp_path, "auto")) == expected
    (warning,) = [record for record in caplog.records if record.name == "trainer.compiled"]
    assert warning.levelno == logging.WARNING and reason in warning.getMessage()


def test_a_compiler_that_compiles_nothing_is_said_without_a_layer():
    cpu = torch.device("cpu")
    assert compiled.compiler_problem(cpu, backend="aot_eager") is None
    assert compiled.compiler_problem(cpu, backend=failing) == "the compiler fails (no compiler)"


def test_comparing_changes_no_loss_and_no_random_number(micro_data: Path, tmp_path: Path, monkeypatch, leave_no_traces):
    for module in ("trainer.prepare", "trainer.compiled"):
        monkeypatch.setattr(f"{module}.compile_layers", quick)
    states = []
    agreed = compiled.agreed

    def watched(*arguments):
        states.append(torch.get_rng_state())
        answer = agreed(*arguments)
        states.append(torch.get_rng_state())
        return answer

    monkeypatch.setattr("trainer.compiled.agreed", watched)
    # A kind with a state of its own, the bias of its router; more kinds take longer and draw nothing else.
    with_it = losses(run_spec(micro_data, tmp_path / "with", True, ("*E",)))
    assert torch.equal(*states)
    monkeypatch.setattr("trainer.compiled.agreed", lambda spec, *_: spec.runtime.compile)
    torch._dynamo.reset()
    assert losses(run_spec(micro_data, tmp_path / "without", True, ("*E",))) == with_it

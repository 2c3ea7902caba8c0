"""A kind of layer needs only its own files and one field of the model's spec, as shown with one defined here."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from trainer.arithmetic.activations import activations
from trainer.arithmetic.describe import describe, render
from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.gpus import by_option
from trainer.arithmetic.memory import training_memory
from trainer.arithmetic.roofline import roofline
from trainer.compiled import kinds as kinds_to_compile
from trainer.fields import SPEC_VERSION, stored, version_of
from trainer.fp8.convert import convert
from trainer.fp8.table import conversion_table
from trainer.hf import own
from trainer.kinds.base import RESIDUAL, Convolution, Count, Init, Kind, ModelShape, Parameter, Widths, matrix, vector
from trainer.model.hybrid import build_model
from trainer.model.linear import Linear
from trainer.model.mamba2 import CausalConv
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.optim import build_optimizers
from trainer.parameters import parameters
from trainer.precision import Precision
from trainer.recomputing import set_policy
from trainer.spec import Fp8Spec, OptimizerSpec
from trainer.specbase import SpecError, parse


class GatedConvSpec(Kind):
    """A short convolution between two projections, gated (as in LFM2)."""

    symbol: ClassVar[str] = "C"
    label: ClassVar[str] = "gated convolution"
    mixer: ClassVar[str] = f"{__name__}:GatedConv"
    recomputed: ClassVar[str] = "norm, convolution"
    since: ClassVar[int] = SPEC_VERSION + 1

    width: Count
    taps: Count = 3

    def widths(self) -> str:
        return f"{self.width} channels, {self.taps} taps"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        yield matrix("in_proj.weight", 2 * self.width, model.hidden, blocks=(self.width, self.width))
        yield vector("conv.weight", self.width, self.taps, init=Init("uniform", -0.5, 0.5), decay=True)
        yield matrix("out_proj.weight", model.hidden, self.width, RESIDUAL)

    def kept(self, hidden: int, widths: Widths) -> int:
        return 4 * self.width * widths.product

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return 2 * self.width * widths.product

    def convolutions(self, hidden: int) -> tuple[Convolution, ...]:
        return (Convolution(self.taps, 1, (self.width,)),)


class GatedConv(Mixer):
    def __init__(self, model: ModelSpec, spec: GatedConvSpec, functions: Functions) -> None:
        super().__init__()
        self.convolve = functions["conv"]
        self.in_proj = Linear(model.hidden, 2 * spec.width)
        self.conv = CausalConv(spec.width, spec.taps, bias=False)
        self.out_proj = Linear(spec.width, model.hidden)

    def project(self, x_BTD: Tensor) -> tuple[Tensor]:
        return (self.in_proj(x_BTD),)

    def mix(self, both_BTG: Tensor, documents: Documents) -> Mixed:
        def convolved(both_BTG: Tensor) -> Tensor:
            gate_BTF, value_BTF = both_BTG.chunk(2, dim=-1)
            return self.out_proj(F.silu(gate_BTF) * self.convolve(value_BTF, self.conv.weight, None, documents))

        return Mixed(self.region("selective", convolved, both_BTG))


class GrownSpec(ModelSpec):
    gated_conv: GatedConvSpec | None = None


GrownSpec.__name__ = "ModelSpec"  # by which trainer/fields.py knows its fields

SPEC: dict[str, Any] = {
    "vocab_size": 64,
    "hidden": 64,
    "layers": ["C-", "*C"],
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32},
    "mlp": {"width": 64},
    "gated_conv": {"width": 32},
}

FP8 = Fp8Spec(implementation="emulated", recipe="current", bf16_end_layers=0)


def batch(rows: int = 2, length: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    ids_BT = (torch.arange(rows)[:, None] * 5 + torch.arange(length) * 3) % 64
    return ids_BT, (torch.arange(length) > 20).int().expand(rows, -1).contiguous(), ids_BT.roll(-1, dims=1)


def test_the_spec_knows_it_and_those_that_do_not_use_it_are_as_before() -> None:
    spec = parse(GrownSpec, SPEC)
    assert spec.kinds["C"] is GatedConvSpec and "C" not in ModelSpec.kinds
    assert version_of(spec) == SPEC_VERSION + 1 and stored(spec)["gated_conv"] == {"width": 32, "taps": 3}
    assert own.misfit(spec) == "the modelling file has no gated convolution; add it to trainer/hf/mixers_yaongi.py"
    plain = {**SPEC, "layers": ["*-"], "gated_conv": None}
    former = {name: value for name, value in plain.items() if name != "gated_conv"}
    assert stored(parse(GrownSpec, plain)) == stored(parse(ModelSpec, former))
    with pytest.raises(SpecError, match="layers use 'C' but the section 'gated_conv' is missing"):
        parse(GrownSpec, {**SPEC, "gated_conv": None})
    with pytest.raises(SpecError, match=r"sublayers are M \(mamba\), .*C \(gated_conv\)"):
        parse(GrownSpec, {**SPEC, "layers": ["X"]})


def test_arithmetic_and_tables_follow() -> None:
    spec = parse(GrownSpec, SPEC)
    model = build_model(spec, device="meta", seed=0)
    assert {p.name: p.shape for p in parameters(spec)} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    figures = describe(spec, 48)
    assert figures.total == sum(p.numel() for p in model.parameters())
    assert flops_per_token(spec, 48) == figures.flops_per_token > 0
    bound = roofline(spec, by_option("h100"), seq_len=48, micro_batch_tokens=96, micro_batches=1)
    assert bound.rows["gated convolution"].flops == 2 * 96 * 6 * 3 * 32 * 64  # two of them, three maps each
    assert training_memory(spec).weights == 4 * figures.total
    assert activations(spec, 48, "selective").recomputed[0] == "C: norm, convolution"
    page = io.StringIO()
    render(figures, Console(file=page, width=120))
    assert "gated convolution" in page.getvalue() and "32 channels, 3 taps" in page.getvalue()
    rows = {row.name: row for row in conversion_table(spec, FP8)}
    assert rows["layers.0.0.mixer.in_proj.weight"].converted and not rows["layers.0.0.mixer.conv.weight"].converted
    assert [str(kind) for kind in kinds_to_compile(spec, Precision("fp32", None, False, ""))] == ["C-", "*C"]


@pytest.mark.parametrize("fp8", [False, True])
def test_it_trains_in_packed_rows(fp8: bool) -> None:
    spec = parse(GrownSpec, SPEC)
    model = build_model(spec, seed=0)
    if fp8:
        convert(model, spec, FP8, torch.device("cpu"))
    set_policy(model, "selective")
    optimizers = build_optimizers(model, OptimizerSpec.model_validate({"muon": {"learning_rate": 0.01}}), spec)
    losses = []
    for _ in range(8):
        model.zero_grad()
        loss = model(*batch()).ce_sum / 96
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    if fp8:
        return  # one scale for all tokens
    ids_BT, seq_idx_BT, _ = batch()
    packed = model(ids_BT, seq_idx_BT).logits_BTV[:, 21:]
    torch.testing.assert_close(packed, model(ids_BT[:, 21:], seq_idx_BT[:, 21:]).logits_BTV, atol=1e-4, rtol=1e-3)


def test_a_parameter_that_its_kind_does_not_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse(GrownSpec, SPEC)

    def fewer(self: GatedConvSpec, model: ModelShape) -> Iterator[Parameter]:
        yield matrix("in_proj.weight", 2 * self.width, model.hidden)

    monkeypatch.setattr(GatedConvSpec, "parameters", fewer)
    with pytest.raises(ValueError, match=r"no kind of layer has the parameter layers\.0\.0\.mixer\.conv\.weight"):
        build_model(spec, seed=0)


def test_its_matrices_may_have_adapters() -> None:
    spec = parse(GrownSpec, {**SPEC, "lora": {"rank": 4}})
    assert spec.adaptable()["gated_conv"] == ["in_proj", "out_proj"]
    model = build_model(spec, seed=0)
    optimizers = build_optimizers(model, OptimizerSpec.model_validate({"adamw": {"learning_rate": 0.05}}), spec)
    for _ in range(2):
        model.zero_grad()
        model(*batch()).ce_sum.backward()
        optimizers.step()
    added = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert "layers.0.0.mixer.in_proj.lora_B" in added and all(p.any() for p in added.values())

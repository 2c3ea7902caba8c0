"""The conversion table of every preset: which matrices use FP8, which do not, and that no matrix is missing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from manifests.spec import load_job
from trainer import precision
from trainer.fp8.table import conversion_table, render, share, summary
from trainer.modelspec import ModelSpec
from trainer.parameters import parameters
from trainer.spec import Fp8Spec, PrecisionSpec
from trainer.specbase import parse

PRESETS = ["tiny", "small", "h100-4b", "h100-4b-interleaved"]
LARGE = ["h100-4b", "h100-4b-interleaved"]
NEVER = {"router", "head", "embedding", "tables", "dt_proj", "conv", "norm", "A_log", "D", "dt_bias", "key_norm"}
ALWAYS = {"zxbc_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_EFD", "down_EDF"}


def model(preset: str) -> ModelSpec:
    return load_job(preset).train.model


@pytest.mark.parametrize("recipe", ["delayed", "current", "block128"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_has_one_line_and_the_sensitive_ones_are_kept(preset, recipe):
    spec = model(preset)
    rows = conversion_table(spec, Fp8Spec(recipe=recipe))
    assert [row.name for row in rows] == [parameter.name for parameter in parameters(spec)]
    converted = [row for row in rows if row.converted]
    assert converted and not NEVER & {row.kind for row in converted}
    last = len(spec.layers) - 1
    assert not any(row.name.startswith(("layers.0.", f"layers.{last}.")) for row in converted)
    multiple = 128 if recipe == "block128" else 16
    assert all(side % multiple == 0 for row in converted for side in row.shape[-2:])
    assert all(row.reason for row in rows)


@pytest.mark.parametrize("preset", LARGE)
def test_large_presets_convert_every_product_of_the_inner_layers_even_in_blocks(preset):
    spec = model(preset)
    inner = {f"layers.{index}." for index in range(1, len(spec.layers) - 1)}
    for row in conversion_table(spec, Fp8Spec(recipe="block128")):
        if row.active and row.kind not in NEVER and row.name[: row.name.index(".", 7) + 1] in inner:
            assert row.converted, row
    assert share(conversion_table(spec, Fp8Spec())) > 0.8


def test_counts_of_h100_4b_by_hand():
    """42 Mamba + expert layers and 8 of attention, less the first and the last, which are of the former kind."""
    lines = summary(conversion_table(model("h100-4b"), Fp8Spec(recipe="block128")))
    assert "FP8    40 × zxbc_proj: sides are multiples of 128" in lines
    assert "FP8    40 × up_EFD: sides are multiples of 128" in lines
    assert "FP8     8 × q_proj: sides are multiples of 128" in lines
    assert "FP8     2 × key_proj: sides are multiples of 128" in lines
    assert "BF16    2 × zxbc_proj: in the first or last 1 layers" in lines
    assert any(line.startswith("BF16   42 × router: ") for line in lines)
    assert any(line.startswith("BF16    1 × head: ") for line in lines)


def test_sides_that_cannot_be_tiled_are_named():
    """zxbc of `tiny` has 320 rows: a multiple of 16, not of 128."""
    by_recipe = {
        recipe: [row for row in conversion_table(model("tiny"), Fp8Spec(recipe=recipe)) if row.kind == "zxbc_proj"][1]
        for recipe in ("current", "block128")
    }
    assert by_recipe["current"].converted
    assert by_recipe["block128"].reason == "side 320 is not a multiple of 128"


def test_options_move_the_border():
    spec = model("small")
    everything = conversion_table(spec, Fp8Spec(bf16_end_layers=0))
    assert any(row.converted and row.name.startswith("layers.0.") for row in everything)
    nothing = conversion_table(spec, Fp8Spec(bf16_end_layers=6))
    assert not any(row.converted for row in nothing) and share(nothing) == 0
    without_experts = conversion_table(spec, Fp8Spec(), experts_problem="no kernel")
    assert {row.reason for row in without_experts if row.kind == "up_EFD"} == {
        "no kernel",
        "in the first or last 1 layers",
    }
    assert all(kind in {row.kind for row in everything if row.converted} for kind in ALWAYS)


def test_it_prints_as_a_table():
    page = io.StringIO()
    render(conversion_table(model("tiny"), Fp8Spec()), "tiny", Console(file=page, width=120))
    assert "of the products' operations in FP8" in page.getvalue()
    assert "routing is FP32" in page.getvalue() and "up_EFD" in page.getvalue()


def test_the_head_and_narrow_experts_follow_their_options():
    spec = model("h100-4b")  # experts 256 wide
    fp8 = Fp8Spec(head=True, experts_from=512)
    found = {row.name: row for row in conversion_table(spec, fp8)}
    assert found["head.weight"].converted
    experts = [row for row in found.values() if len(row.shape) == 3]
    assert experts and not any(row.converted for row in experts)
    inside = [row for row in experts if not row.name.startswith(("layers.0.", "layers.51."))]
    assert {row.reason for row in inside} == {"experts are 256 wide, FP8 is used from 512 on"}
    wide = conversion_table(model("h100-4b-interleaved"), fp8)
    assert any(row.converted for row in wide if len(row.shape) == 3)
    assert any(row.converted for row in conversion_table(spec, Fp8Spec(experts_from=256)) if len(row.shape) == 3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"implementation": "te"}, "Transformer Engine converts modules, and the cross-entropy is none"),
        ({"recipe": "block128"}, "the cross-entropy is not computed in blocks"),
    ],
)
def test_a_head_that_cannot_be_fp8_is_kept_with_the_reason(options, reason):
    rows = {row.name: row for row in conversion_table(model("h100-4b"), Fp8Spec(head=True, **options))}
    assert not rows["head.weight"].converted and rows["head.weight"].reason == reason


def test_a_tied_head_is_kept():
    tied = model("tiny").updated({"tied_embedding": True})
    assert not any(row.converted for row in conversion_table(tied, Fp8Spec(head=True)) if row.kind == "embedding")


def test_auto_follows_the_rule_and_a_format_that_is_named_converts_as_before():
    def found(**options: object) -> Fp8Spec:
        spec = parse(PrecisionSpec, options)
        return precision.resolve(spec, (9, 0), {"torch": None}).fp8

    assert (found().head, found().experts_from) == (True, 512)
    assert (found(dtype="fp8").head, found(dtype="fp8").experts_from) == (None, None)
    own = {"head": False, "experts_from": 64}
    assert (found(fp8=own).head, found(fp8=own).experts_from) == (False, 64)
    before = [row for row in conversion_table(model("h100-4b"), found(dtype="fp8")) if row.converted]
    assert any(len(row.shape) == 3 for row in before) and not any(row.name == "head.weight" for row in before)

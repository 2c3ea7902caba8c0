"""Our use of Transformer Engine against the real package: recipes, signatures, conversion. Its modules need a GPU to
run, but not to be built on "meta". Run by `make test-kernels`.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from manifests.spec import load_job
from trainer.fp8 import te
from trainer.fp8.table import conversion_table
from trainer.model.hybrid import build_model
from trainer.ops import packages
from trainer.spec import Fp8Spec

pytestmark = pytest.mark.kernels


def test_recipes_are_the_packages_own():
    from transformer_engine.common import recipe

    made = te.recipe(Fp8Spec(recipe="delayed", margin=2, amax_history_steps=64))
    assert isinstance(made, recipe.DelayedScaling)
    assert (made.margin, made.amax_history_len, made.amax_compute_algo) == (2, 64, "max")
    assert made.fp8_format == recipe.Format.HYBRID and made.reduce_amax
    made = te.recipe(Fp8Spec(recipe="current", format="e4m3"))
    assert isinstance(made, recipe.Float8CurrentScaling) and made.fp8_format == recipe.Format.E4M3
    made = te.recipe(Fp8Spec(recipe="block128"))
    assert isinstance(made, recipe.Float8BlockScaling) and made.fp8_format == recipe.Format.E4M3
    assert (made.x_block_scaling_dim, made.w_block_scaling_dim, made.grad_block_scaling_dim) == (1, 2, 1)
    assert made.fp8_quant_fwd_inp.power_2_scale and made.fp8_quant_bwd_grad.power_2_scale


@pytest.mark.parametrize("recipe", ["delayed", "current", "block128"])
def test_autocast_takes_our_arguments_and_asks_for_a_gpu_when_entered(recipe):
    context = te.autocast(Fp8Spec(recipe=recipe))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"driver|CUDA"), context:
            pass


def test_conversion_replaces_modules_and_keeps_parameters(monkeypatch):
    """Every converted matrix of `small`: the same parameter objects under the same names, no pickle in the state."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # all that building on "meta" needs
    spec = load_job("small").train.model
    model = build_model(spec, device="meta", seed=0)
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    fp8 = Fp8Spec(recipe="current", implementation="te")
    rows = conversion_table(spec, fp8, experts_problem="the experts backend te casts by itself")
    chosen = [row.name for row in rows if row.converted]
    state = te.convert(model, chosen, fp8)
    linear = packages.load(te.PACKAGE).Linear
    replaced = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, linear)}
    assert replaced == set(chosen) and len(chosen) > 20
    assert dict(model.named_modules()) == modules, "FSDP2 knows these objects"
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert model.state_dict().keys() == build_model(spec, device="meta", seed=0).state_dict().keys()
    assert state.state_dict() == {} and state.figures() == ({}, 0.0), "only the delayed recipe has a history"


def test_the_parts_of_modules_that_we_reach_into_are_there(monkeypatch):
    """TeState saves histories as tensors, as the package itself would pickle them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = packages.load(te.PACKAGE).Linear(32, 16, bias=False, params_dtype=torch.float32, device="meta")
    assert list(inspect.signature(module.init_fp8_meta_tensors).parameters) == ["recipe"]
    assert isinstance(module.fp8_meta, dict)
    source = inspect.getsource(type(module).__mro__[1])
    for part in ('fp8_meta["num_gemms"]', '"scaling_fwd"', '"scaling_bwd"', ".amax_history", ".scale"):
        assert part in source, part

"""μP: the spectral condition on real initial weights and updates, and the coordinate check over widths."""

from __future__ import annotations

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.optim import build_optimizers
from trainer.optim.muon import Muon
from trainer.optim.rules import assign
from trainer.spec import OptimizerSpec

BASE = 32


def wide(hidden: int, **changes) -> ModelSpec:
    return ModelSpec(
        vocab_size=64,
        hidden=hidden,
        layers=["ME", "*-", "N"],
        mamba={"num_heads": hidden // 16, "head_dim": 16, "d_state": 16},
        attention={"num_heads": hidden // 16, "num_kv_heads": hidden // 32, "head_dim": 16},
        moe={"num_experts": 8, "top_k": 2, "expert_width": hidden // 2},
        mlp={"width": 2 * hidden},
        engram=[{"layer": 2, "rows_per_head": 50, "width_per_order": hidden // 2, "compress_tokens": False}],
        mup={"base_hidden": BASE, **changes},
    )


def norm_over_condition(x_mn: Tensor) -> float:
    """Spectral norm / √(m/n): to be the same at every width."""
    return float(torch.linalg.matrix_norm(x_mn.detach(), 2)) / math.sqrt(x_mn.shape[0] / x_mn.shape[1])


def test_initial_norms_meet_the_spectral_condition():
    """Whatever the shape: as a square matrix at base width, whose norm is init_std · 2√base."""
    model = build_model(wide(256), seed=0)
    mlp, depth = model.layers[1][1].mixer, math.sqrt(model.spec.num_sublayers)
    matrices = {
        "square": model.layers[1][0].mixer.q_proj.weight,
        "router, as many rows at any width": model.layers[0][1].mixer.router.weight,
        "to wide": mlp.up.weight,
        "from wide, into the residual stream": mlp.down.weight * depth,
        "one expert": model.layers[0][1].mixer.up_EFD[3],
        "engram key": model.layers[2][0].mixer.key_proj.weight,
    }
    for name, matrix in matrices.items():
        expected = model.spec.init_std * 2 * math.sqrt(BASE)
        assert norm_over_condition(matrix) == pytest.approx(expected, rel=0.1), name
    for looked_up in (model.embedding.weight, model.head.weight, model.layers[2][0].mixer.tables.weight):
        assert looked_up.std().item() == pytest.approx(model.spec.init_std, rel=0.05)


@pytest.mark.parametrize("shape", [(32, 32), (256, 256), (8, 256), (256, 64)])
@pytest.mark.parametrize("layers", [1, 2])
def test_muon_updates_meet_the_spectral_condition(shape, layers):
    """Whatever the shape: as a square matrix at base width without μP, of norm lr · 0.2·√base; stacks √K times that."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(layers)]
    for weight in weights:
        weight.grad = torch.randn(shape)
    group = {"params": weights, "stacks": [tuple(range(layers))], "spectral_base": BASE * layers**2}
    Muon([group], lr=0.1, weight_decay=0, steps=9).step()
    joint = torch.cat([weight.detach() for weight in weights], dim=1)
    norm = float(torch.linalg.matrix_norm(joint, 2)) / math.sqrt(shape[0] / shape[1])
    assert norm == pytest.approx(0.1 * 0.2 * math.sqrt(BASE * layers), rel=0.02)


def test_muon_groups_of_a_model_carry_the_base():
    spec = wide(64).updated({"layers": ["*", "*", "*"], "engram": []})
    optimizer = OptimizerSpec.model_validate({"muon": {"teon_layers": 2}})
    groups = build_optimizers(build_model(spec, seed=0), optimizer, spec).members["muon"].param_groups
    found = {group["spectral_base"]: len(group["params"]) for group in groups}
    assert found == {BASE: 3 + 3, BASE * 4: 2 * 3}, "o_proj and the layer left over alone; q, k and v of two stacked"
    plain = spec.updated({"mup": None})
    groups = build_optimizers(build_model(plain, seed=0), OptimizerSpec(), plain).members["muon"].param_groups
    assert [group["spectral_base"] for group in groups] == [None]


def test_adamw_rates_fall_with_the_inputs_of_a_matrix_and_its_decay_does_not_change():
    spec = wide(256)
    shapes = [(name, tuple(p.shape)) for name, p in build_model(spec, device="meta", seed=0).named_parameters()]
    table = {entry.name: entry for entry in assign(shapes, OptimizerSpec(name="adamw"), spec)}
    assert all(entry.rate_factor * entry.decay_factor in (1, 5) for entry in table.values())
    rates = {name: entry.rate_factor for name, entry in table.items()}
    assert rates["layers.1.0.mixer.q_proj.weight"] == rates["layers.0.1.mixer.router.weight"] == BASE / 256
    assert rates["layers.0.1.mixer.down_EDF"] == BASE / 128 and rates["layers.1.1.mixer.down.weight"] == BASE / 512
    unchanged = ("embedding.weight", "head.weight", "final_norm.weight", "layers.0.0.mixer.conv.weight")
    assert all(rates[name] == 1 for name in unchanged) and rates["layers.2.0.mixer.tables.weight"] == 5


def test_products_of_whole_vectors_are_divided_by_their_length():
    plain, wider = wide(128).updated({"mup": None}), wide(128, base_head_dim=4)
    models = [build_model(spec, seed=0) for spec in (plain, wider)]
    models[1].load_state_dict(models[0].state_dict())
    attention = [model.layers[1][0].mixer for model in models]
    assert attention[1].query_factor == 0.5 and attention[0].query_factor == 1  # √16 becomes 16/√4
    assert models[1].layers[2][0].mixer.gate_factor == 0.5  # √128 becomes 128/√32
    ids_BT = torch.randint(0, 64, (1, 12))
    bare = [model.updated({"layers": ["-"], "engram": []}) for model in (plain, wider)]
    logits = [build_model(spec, seed=0)(ids_BT, torch.zeros_like(ids_BT)).logits_BTV for spec in bare[:1]]
    scaled = build_model(bare[1], seed=0)
    scaled.load_state_dict(build_model(bare[0], seed=0).state_dict())
    torch.testing.assert_close(scaled(ids_BT, torch.zeros_like(ids_BT)).logits_BTV, logits[0] * BASE / 128)


def benchmark() -> ModuleType:
    found = spec_from_file_location("mup_benchmark", Path(__file__).parents[2] / "benchmarks" / "mup.py")
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_coordinate_check(name):
    """Five steps have the same effect at four times the width with μP, and a larger one without."""
    mup, widths = benchmark(), [64, 256]
    exponents = {}
    for with_mup in (False, True):
        moved = mup.coordinate_check(widths, with_mup=with_mup, rate=2.0**-8, name=name)
        exponents[with_mup] = {what: mup.slope(widths, values) for what, values in moved.items()}
    assert exponents[False]["hidden"] > 0.4 and exponents[False]["logits"] > 0.6, exponents
    assert all(abs(exponent) < 0.25 for exponent in exponents[True].values()), exponents

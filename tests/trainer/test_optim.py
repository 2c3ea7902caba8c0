"""Which parameter gets which optimizer, the wrapper around both, and its state."""

import copy
import math

import pytest
import torch
from bounds import below
from named import DECODER, EXPECTED, MODEL, OF_DECODER, Named
from torch import nn

from manifests.spec import load_job
from trainer.model.hybrid import build_model
from trainer.optim import adamw as adamw_module
from trainer.optim import build_optimizers, clip_gradients
from trainer.optim.muon import Muon
from trainer.optim.rules import assign, render
from trainer.spec import OptimizerSpec
from trainer.specbase import SpecError, parse

LAYERS = ["layers.2.0", "layers.10.0", "layers.11.1", "layers.12.0", "layers.13.0", "mtp.0.layer.0"]


def model():
    return Named({name: expected[0] for name, expected in EXPECTED.items()})


@pytest.mark.parametrize(("expected", "spec"), [(EXPECTED, MODEL), (OF_DECODER, DECODER)], ids=["hybrid", "decoder"])
def test_table_by_hand(expected, spec):
    table = assign([(name, e[0]) for name, e in expected.items()], OptimizerSpec(), spec)
    for entry in table:
        _, optimizer, blocks, rate, decay = expected[entry.name]
        count = math.prod(entry.shape[:-2]) * max(1, len(entry.block_rows)) if optimizer == "muon" else 0
        assert (entry.optimizer, count, entry.rate_factor, entry.decay) == (optimizer, blocks, rate, decay), entry.name


def test_blocks_are_the_maps_that_are_stored_together():
    blocks = {
        entry.name: entry.block_rows
        for expected, spec in ((EXPECTED, MODEL), (OF_DECODER, DECODER))
        for entry in assign([(name, e[0]) for name, e in expected.items()], OptimizerSpec(), spec)
    }
    assert blocks["layers.0.0.mixer.zxbc_proj.weight"] == (16, 16, 4, 4)
    assert blocks["layers.1.0.mixer.q_proj.weight"] == (4, 4, 4, 4)
    assert blocks["layers.0.1.mixer.gate_up.weight"] == (24, 24)
    assert blocks["layers.1.1.mixer.gate_up_EGD"] == (12, 12)


def test_gate_and_up_of_every_expert_are_orthogonalised_alone():
    """Stored one below the other they step as they would as parameters of their own."""
    together, apart = {"w": (3, 24, 16)}, {f"w{e}{half}": (12, 16) for e in range(3) for half in "gu"}
    joint, alone = Named(together), Named(apart)
    with torch.no_grad():
        for e in range(3):
            for half, rows in (("g", slice(0, 12)), ("u", slice(12, 24))):
                getattr(alone, f"w{e}{half}").copy_(joint.w[e, rows])
    optimizers = (
        Muon([{"params": [joint.w], "block_rows": [(12, 12)]}], lr=0.1),
        Muon(list(alone.parameters()), lr=0.1),
    )
    for seed in range(3):
        joint.fill_gradients(seed)
        for e in range(3):
            for half, rows in (("g", slice(0, 12)), ("u", slice(12, 24))):
                getattr(alone, f"w{e}{half}").grad = joint.w.grad[e, rows].clone()
        for optimizer in optimizers:
            optimizer.step()
    for e in range(3):
        torch.testing.assert_close(joint.w[e, :12], getattr(alone, f"w{e}g"), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(joint.w[e, 12:], getattr(alone, f"w{e}u"), atol=1e-6, rtol=1e-5)


ATTENTION = [f"{layer}.mixer.{leaf}_proj.weight" for layer in LAYERS for leaf in "qkvo"]


def stacks(layers: int) -> dict[str, tuple[str, ...]]:
    spec = OptimizerSpec.model_validate({"muon": {"teon_layers": layers}})
    places = ["-"] * 14
    places[2] = places[10] = places[12] = places[13] = "*"
    places[11] = "-*"
    deep = MODEL.updated({"layers": places, "engram": [], "mtp": {"layer": "*"}})
    shapes = [(name, (8 if ".k_" in name or ".v_" in name else 16, 16)) for name in ATTENTION]
    return {entry.name: entry.stack for entry in assign(shapes, spec, deep)}


def test_teon_pairs_successive_layers_and_leaves_the_odd_one_alone():
    found = stacks(2)
    for leaf in "qkv":
        names = [f"{layer}.mixer.{leaf}_proj.weight" for layer in LAYERS]
        pair, next_pair = tuple(names[:2]), tuple(names[2:4])
        assert [found[name] for name in names] == [pair, pair, next_pair, next_pair, (names[4],), (names[5],)]
    assert all(found[name] == (name,) for name in ATTENTION if "o_proj" in name)
    assert len(stacks(5)["layers.2.0.mixer.q_proj.weight"]) == 5
    assert all(stack == (name,) for name, stack in stacks(1).items())


def test_teon_of_one_layer_is_muon_to_the_bit():
    networks = []
    for options in ({}, {"teon_layers": 1}, {"teon_layers": 2}):  # with one attention layer a pair is never full
        networks.append(model())
        optimizers = build_optimizers(networks[-1], OptimizerSpec.model_validate({"muon": options}), MODEL)
        for seed in range(3):
            networks[-1].fill_gradients(seed)
            optimizers.step()
    for muon, teon_of_one, teon_of_two in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(muon, teon_of_one) and torch.equal(muon, teon_of_two)


def test_unknown_parameter_is_named():
    with pytest.raises(ValueError, match=r"no kind of layer has the parameter layers\.0\.0\.mixer\.gate\.weight"):
        assign([("layers.0.0.mixer.gate.weight", (2, 2))], OptimizerSpec(), MODEL)


def test_blocks_that_do_not_fill_the_matrix_are_refused():
    with pytest.raises(ValueError, match="blocks have"):
        assign([("layers.0.0.mixer.zxbc_proj.weight", (41, 16))], OptimizerSpec(), MODEL)


def test_render_has_a_line_for_each_parameter():
    table = assign([(name, e[0]) for name, e in EXPECTED.items()], OptimizerSpec(), MODEL)
    lines = render(table).splitlines()
    assert len(lines) == len(EXPECTED) + 1
    assert lines[1 + list(EXPECTED).index("layers.0.1.mixer.up_EFD")].split() == [
        "layers.0.1.mixer.up_EFD", "3×8×16", "muon", "3", "×1", "yes", "-",
    ]  # fmt: skip


def test_every_parameter_moves_once_and_decays_as_said():
    network = model()
    spec = OptimizerSpec.model_validate({"muon": {"learning_rate": 0.1}, "adamw": {"learning_rate": 0.1}})
    optimizers = build_optimizers(network, spec, MODEL)
    assert sorted(map(id, optimizers.parameters)) == sorted(map(id, network.parameters()))
    before = copy.deepcopy(dict(network.named_parameters()))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()  # without a gradient what is left is the decay lr·λ = 0.1·0.1
    for name, parameter in network.named_parameters():
        factor = 1 - 0.1 * 0.1 if EXPECTED[name][4] else 1.0
        torch.testing.assert_close(parameter.detach(), before[name].detach() * factor)


def test_engram_tables_step_five_times_as_far():
    network = model()
    optimizers = build_optimizers(network, OptimizerSpec.model_validate({"adamw": {"learning_rate": 0.01}}), MODEL)
    before = copy.deepcopy(dict(network.named_parameters()))
    network.fill_gradients(1)
    optimizers.step()
    moved = {n: (p - before[n]).abs().mean().item() for n, p in network.named_parameters()}
    assert moved["layers.2.0.mixer.tables.weight"] == pytest.approx(0.05, rel=1e-3)  # Adam's first step is lr·sign
    assert moved["layers.2.0.mixer.key_norm.weight"] == pytest.approx(0.01, rel=1e-3)


def test_adamw_for_everything():
    network = model()
    optimizers = build_optimizers(network, OptimizerSpec(name="adamw"), MODEL)
    assert set(optimizers.members) == {"adamw"}
    reference = {name: nn.Parameter(p.detach().clone()) for name, p in network.named_parameters()}
    groups = [
        {"params": [p], "weight_decay": 0.1 * EXPECTED[name][4], "lr": 2e-3 * EXPECTED[name][3]}
        for name, p in reference.items()
    ]
    plain = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for seed in range(3):
        network.fill_gradients(seed)
        for name, ours in network.named_parameters():
            reference[name].grad = ours.grad.clone()
        optimizers.step()
        plain.step()
    for name, ours in network.named_parameters():
        torch.testing.assert_close(ours, reference[name], rtol=1e-6, atol=1e-7)


def test_learning_rate_factor_scales_every_group():
    optimizers = build_optimizers(model(), OptimizerSpec(), MODEL)
    peaks = [g["lr"] for m in optimizers.members.values() for g in m.param_groups]
    assert sorted(set(peaks)) == [2e-3, 1e-2]
    for factor in (0.5, 0.1, 1.0):
        optimizers.set_learning_rate_factor(factor)
        rates = [g["lr"] for m in optimizers.members.values() for g in m.param_groups]
        assert rates == pytest.approx([p * factor for p in peaks])
        assert optimizers.learning_rate == pytest.approx(2e-3 * factor)


def test_state_survives_a_checkpoint(tmp_path):
    """Saved by torch.distributed.checkpoint after 2 steps and loaded into a new one: the third step is bit-equal."""
    import torch.distributed.checkpoint as dcp

    first = model()
    a = build_optimizers(first, OptimizerSpec(), MODEL)
    for seed in range(2):
        first.fill_gradients(seed)
        a.step()
    dcp.save(a.state_dict(), checkpoint_id=tmp_path / "c", no_dist=True)
    second = model()
    second.load_state_dict(first.state_dict())
    b = build_optimizers(second, OptimizerSpec(), MODEL)
    assert all(isinstance(value, torch.Tensor) for value in b.state_dict().values())
    state = b.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "c", no_dist=True)
    b.load_state_dict(state)
    for network, optimizers in ((first, a), (second, b)):
        network.fill_gradients(9)
        optimizers.step()
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_foreign_state_is_refused():
    muon, adamw = (build_optimizers(model(), OptimizerSpec(name=name), MODEL) for name in ("muon", "adamw"))
    with pytest.raises(ValueError, match="optimizer state does not fit"):
        muon.load_state_dict(adamw.state_dict())


def test_bf16_moments_train_like_fp32_ones(monkeypatch):
    """Moments are the bfloat16 roundings of what AdamW computes, whatever the size of the pieces."""
    monkeypatch.setattr(adamw_module, "WIDENED_ELEMENTS", 48)
    networks = model(), model()
    kinds = ({"state_dtype": "fp32"}, {"state_dtype": "bf16"})
    exact, narrow = (
        build_optimizers(network, OptimizerSpec.model_validate({"name": "adamw", **kind}), MODEL)
        for network, kind in zip(networks, kinds, strict=True)
    )
    start = copy.deepcopy(dict(networks[0].named_parameters()))
    for seed in range(5):
        for network, optimizers in zip(networks, (exact, narrow), strict=True):
            network.fill_gradients(seed)
            optimizers.step()
    for name, value in narrow.state_dict().items():
        if value.dim():
            assert value.dtype == torch.bfloat16
            torch.testing.assert_close(value.float(), exact.state_dict()[name], rtol=0.02, atol=0.02)
    for (name, a), b in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        below(torch.linalg.norm(a - b), 0.02 * torch.linalg.norm(a - start[name]), name)


@pytest.mark.parametrize("field", ["muon.momentum", "adamw.beta2"])
def test_moments_that_bf16_could_not_let_decay_are_refused(field):
    section, name = field.split(".")
    changes = {"state_dtype": "bf16", section: {name: 0.999}}
    with pytest.raises(SpecError, match=rf"{field} 0\.999 needs state_dtype fp32"):
        parse(OptimizerSpec, changes)
    assert parse(OptimizerSpec, {**changes, "state_dtype": "fp32"})
    moment = torch.ones(3, dtype=torch.bfloat16)
    assert torch.equal((moment.float() * 0.999).bfloat16(), moment), "such a moment never decays"
    assert not torch.equal((moment.float() * 0.99).bfloat16(), moment)


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_clip_gradients(max_norm):
    network = model()
    network.fill_gradients(3)
    flat = torch.cat([p.grad.flatten().double() for p in network.parameters()])
    norm, clipped = (value.item() for value in clip_gradients(network.parameters(), max_norm))
    assert norm == pytest.approx(flat.norm().item(), rel=1e-5)
    assert clipped == (max_norm == 0.5)
    after = torch.cat([p.grad.flatten().double() for p in network.parameters()]).norm().item()
    assert after == pytest.approx(0.5 if clipped else norm, rel=1e-4)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_clip_leaves_gradients_that_are_not_finite(bad):
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, bad, 2.0])
    norm, clipped = clip_gradients([parameter], 1.0)
    assert not torch.isfinite(norm) and not clipped
    assert parameter.grad[0] == 1.0 and parameter.grad[2] == 2.0


def test_loss_scaling_steps_as_without_and_skips_overflow():
    plain, scaled = model(), model()
    a, b = (build_optimizers(network, OptimizerSpec(), MODEL) for network in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    plain.fill_gradients(5)
    a.step()
    scaled.fill_gradients(5)
    scaler.scale(torch.zeros(()))  # a forward pass would; it creates the scale
    for parameter in scaled.parameters():
        parameter.grad *= 1024.0
    b.unscale(scaler)
    b.step()
    scaler.update()
    assert scaler.get_scale() == 2048.0
    for x, y in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    next(iter(scaled.parameters())).grad[0] = float("inf")
    b.unscale(scaler)
    norm, _ = clip_gradients(scaled.parameters(), 1.0)
    assert norm == float("inf")
    scaler.update()
    assert scaler.get_scale() == 1024.0


EXTRAS = {
    "shared expert": {"moe": {"shared_width": 128}},
    "two prediction modules": {"mtp": {"depth": 2, "layer": "*-ME"}},
}


@pytest.mark.parametrize("extra", [None, *EXTRAS])
@pytest.mark.parametrize("preset", ["tiny", "small", "h100-4b", "h100-4b-interleaved"])
def test_rules_are_complete_for_every_preset(preset, extra):
    """With the real model, on the meta device: every parameter gets its line, matrices Muon, vectors AdamW."""
    changes = dict(EXTRAS.get(extra, {}))
    if "interleaved" in preset and "mtp" in changes:
        changes["mlp"] = {"width": 512}
    spec = load_job(preset, {"train": {"model": changes}}).train.model
    network = build_model(spec, device="meta", seed=0)
    shapes = [(name, tuple(p.shape)) for name, p in network.named_parameters()]
    optimizer = OptimizerSpec.model_validate({"muon": {"teon_layers": 2}})
    table = assign(shapes, optimizer, spec)
    assert len(table) == len(shapes)
    for entry in table:
        exempt = any(part in entry.name for part in ("embedding", "head.", "conv", "tables"))
        assert (entry.optimizer == "muon") == (len(entry.shape) >= 2 and not exempt), entry.name
        trunk_qkv = entry.name.startswith("layers.") and any(f".{leaf}_proj." in entry.name for leaf in "qkv")
        assert len(entry.stack) <= 1 or trunk_qkv, entry.name
    attention = "".join(spec.layers).count("*")
    assert sum(len(entry.stack) == 2 for entry in table) == 3 * (attention - attention % 2)

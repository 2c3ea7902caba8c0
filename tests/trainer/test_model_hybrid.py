"""Initialisation, determinism, precision, and one step of every kind of layer at the widths of h100-4b."""

import math

import pytest
import torch

from manifests.spec import load_job
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.ops.ssd import ssd_reference

LARGE = load_job("h100-4b").train.model
TINY = load_job("tiny").train.model
CLASSES = [token // 2 for token in range(4096)]


def batch(spec: ModelSpec, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids_BT = torch.randint(0, spec.vocab_size, (rows, length), generator=generator)
    seq_idx_BT = (torch.rand(rows, length, generator=generator) < 0.03).cumsum(1).int()
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((rows, 1), -100)], dim=1)
    return ids_BT, seq_idx_BT, labels_BT


def test_initialisation_follows_its_table():
    model = build_model(TINY, seed=3, token_classes=CLASSES)
    std, residual = TINY.init_std, TINY.init_std / math.sqrt(TINY.num_sublayers)
    parameters = dict(model.named_parameters())

    def spread(name: str) -> float:
        return parameters[name].std().item()

    for name in ("embedding.weight", "head.weight", "layers.0.0.mixer.zxbc_proj.weight", "layers.0.1.mixer.up_EFD"):
        assert spread(name) == pytest.approx(std, rel=0.05), name
    for name in (
        "layers.0.0.mixer.out_proj.weight",
        "layers.0.1.mixer.down_EDF",
        "layers.1.0.mixer.o_proj.weight",
        "layers.1.1.mixer.down.weight",
        "layers.2.0.mixer.value_proj.weight",
    ):
        assert spread(name) == pytest.approx(residual, rel=0.05), name
    assert spread("layers.2.0.mixer.tables.weight") == pytest.approx(std, rel=0.05)
    for name, parameter in parameters.items():
        if "norm.weight" in name or name.endswith("mixer.D"):
            assert parameter.eq(1).all(), name
    A_log = torch.cat([p for n, p in parameters.items() if n.endswith("A_log")])
    assert A_log.min() >= 0 and A_log.max() <= math.log(16) and A_log.std() > 0.2
    dt = torch.nn.functional.softplus(torch.cat([p for n, p in parameters.items() if n.endswith("dt_bias")]))
    assert 0.99e-3 <= dt.min() < 0.01 and 0.02 < dt.max() <= 0.101
    assert parameters["layers.2.0.mixer.conv.weight"].eq(0).all()
    assert parameters["layers.0.0.mixer.conv.weight"].abs().max() <= 0.5
    assert all(moe.bias_E.eq(0).all() for moe in model.moe_sublayers())


def test_loss_at_the_start_is_that_of_a_uniform_guess():
    model = build_model(TINY, seed=3, token_classes=CLASSES)
    output = model(*batch(TINY, 2, 128))
    assert output.ce_sum.item() / (2 * 127) == pytest.approx(math.log(4096), abs=0.15)
    assert output.logits_BTV is None
    # A balanced router costs weight · 1 for each row and MoE sublayer.
    assert output.aux_sum.item() == pytest.approx(2 * 5 * 1e-4, rel=0.05)


def test_seed_fixes_every_weight_and_another_one_changes_them():
    first, same, other = (build_model(TINY, seed=seed, token_classes=CLASSES) for seed in (1, 1, 2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name)), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    # The hash belongs to the tokens, not to the run.
    hashes = [model.layers[2][0].mixer.hash.multiplier_N for model in (first, other)]
    assert torch.equal(*hashes)


def test_weights_do_not_depend_on_the_rest_of_the_model():
    deep = build_model(TINY, seed=1, token_classes=CLASSES)
    shallow = build_model(TINY.updated({"layers": ["ME"], "engram": []}), seed=1)
    assert torch.equal(deep.layers[0][0].mixer.zxbc_proj.weight, shallow.layers[0][0].mixer.zxbc_proj.weight)


def test_passes_are_bitwise_repeatable():
    model = build_model(TINY, seed=1, token_classes=CLASSES)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        output = model(*batch(TINY, 2, 96))
        (output.ce_sum + output.aux_sum).backward()
        gradients.append([output.ce_sum.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_every_parameter_learns():
    model = build_model(TINY, seed=1, token_classes=CLASSES)
    waiting = {"layers.2.0.mixer.conv_norm.weight"}  # until the convolution behind it has left zero
    output = model(*batch(TINY, 4, 128))
    (output.ce_sum + output.aux_sum).backward()
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.ne(0).any()
        assert learns or name in waiting, name


def test_autocast_stays_close_and_keeps_the_scan_in_fp32(monkeypatch):
    model = build_model(TINY, seed=1, token_classes=CLASSES)
    seen = []
    for layer in model.layers:
        for sublayer in layer:
            if hasattr(sublayer.mixer, "scan"):

                def watch(x, dt, A, *rest):
                    seen.append((x.dtype, dt.dtype, A.dtype, torch.is_autocast_enabled("cpu")))
                    return ssd_reference(x, dt, A, *rest)

                monkeypatch.setattr(sublayer.mixer, "scan", watch)
    exact = model(*batch(TINY, 2, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*batch(TINY, 2, 64))
    assert set(seen) == {
        (torch.float32, torch.float32, torch.float32, False),
        (torch.bfloat16, torch.float32, torch.float32, False),
    }
    assert rounded.ce_sum.dtype == torch.float32
    torch.testing.assert_close(rounded.ce_sum, exact.ce_sum, rtol=2e-3, atol=0)


def test_a_few_steps_learn_a_repeated_text():
    model = build_model(TINY, seed=1, token_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    arguments = batch(TINY, 2, 64)
    losses = []
    for _ in range(12):
        output = model(*arguments)
        losses.append(output.ce_sum.item() / (2 * 63))
        optimizer.zero_grad()
        (output.ce_sum / (2 * 63) + output.aux_sum / 2).backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("layers", "share"),
    [
        pytest.param(["ME"], 1, id="ME"),
        pytest.param(["*-"], 1, id="*-"),
        pytest.param(["N"], 16, id="N"),
        pytest.param(["N"], 1, id="N whole", marks=[pytest.mark.slow, pytest.mark.proof]),
    ],
)
def test_one_training_step_at_the_widths_of_h100_4b(layers, share):
    """One layer of each kind with its real sizes, except the vocabulary; Engram is the larger of the two (4-grams).

    Its tables usually have only one in `share` rows, because initialising all of them takes 15 s.
    """
    engram = {**LARGE.engram[1].model_dump(), "layer": 0}
    engram = [engram | {"rows_per_head": engram["rows_per_head"] // share}] if layers == ["N"] else []
    spec = LARGE.updated({"vocab_size": 2048, "layers": layers, "engram": engram})
    model = build_model(spec, seed=0, token_classes=list(range(spec.vocab_size)))
    ids_BT, seq_idx_BT, labels_BT = batch(spec, 1, 128)
    output = model(ids_BT, seq_idx_BT, labels_BT)
    assert output.ce_sum.item() / 127 == pytest.approx(math.log(spec.vocab_size), abs=1.0)
    (output.ce_sum + output.aux_sum).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad.ne(0).any() or "conv_norm" in name), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "layer"),
    [
        ("dual-h100-dense", "*-"),
        ("qwen3-30b-a3b", "*E"),
        ("nemotron-3-nano", "M*"),
        ("nemotron-3-nano", "E"),
    ],
)
def test_one_layer_of_the_other_presets_learns_at_its_true_width(preset: str, layer: str):
    """With at most 32 experts: all 128 of Nemotron's, with their gradients, would take 10 GB."""
    spec = load_job(preset).train.model.updated({"vocab_size": 2048, "layers": [layer]})
    if spec.moe:
        spec = spec.updated({"moe": {"num_experts": 32}})
    model = build_model(spec, seed=0)
    arguments = batch(spec, 1, 128)

    def loss() -> torch.Tensor:
        output = model(*arguments)
        return output.ce_sum / 127 + output.aux_sum

    before = loss()
    before.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.ne(0).any(), name
            parameter.sub_(parameter.grad, alpha=0.1)
        assert loss() < before - 0.01

"""Muon against torch's own, against exact arithmetic in fp64, and against itself one matrix at a time."""

import pytest
import torch

from trainer.optim import muon as muon_module
from trainer.optim.muon import Muon
from trainer.optim.orthogonal import iteration, orthogonalise


def _problem(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    return weights, gradients


def _train(optimizer_class, weights, gradients, **options):
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = optimizer_class(parameters, **options)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon(steps, nesterov):
    weights, gradients = _problem((24, 40), (40, 24), (16, 16), (24, 40))
    common = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.3}
    ours = _train(
        Muon, weights, gradients[:steps], coefficients="newton_schulz", iteration_dtype=torch.bfloat16, **common
    )
    theirs = _train(torch.optim.Muon, weights, gradients[:steps], adjust_lr_fn="match_rms_adamw", **common)
    for start, a, b in zip(weights, ours, theirs, strict=True):
        # bf16 has 8 bits; the update itself must agree, not only the weight that dwarfs it.
        assert torch.linalg.norm(a - b) < 0.02 * torch.linalg.norm(b - start)


@pytest.mark.parametrize("coefficients", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_iteration_is_its_polynomial_on_the_singular_values(coefficients, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    per_step, safety = iteration(coefficients, 5)
    s = s / (safety * torch.linalg.norm(x))
    for a, b, c in per_step:
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag(s) @ vh
    torch.testing.assert_close(orthogonalise(x[None], coefficients, 5, torch.float64)[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(orthogonalise(x[None].float(), coefficients)[0], expected.float(), rtol=0, atol=2e-5)
    # and those singular values are near those of the polar factor UVᵀ
    assert s.min() > 0.6 and s.max() < 1.25


def test_more_polar_express_steps_converge_to_the_polar_factor():
    x = torch.randn(20, 33, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    errors = [
        torch.linalg.matrix_norm(orthogonalise(x[None], "polar_express", n, torch.float64)[0] - u @ vh, ord=2).item()
        for n in (2, 5, 7, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_direction_does_not_depend_on_the_size_of_the_gradient(scale):
    x = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(orthogonalise(x * scale), orthogonalise(x), rtol=1e-4, atol=1e-5)


def test_zero_matrix_stays_zero_in_a_batch():
    x = torch.randn(2, 8, 12)
    x[0] = 0
    out = orthogonalise(x)
    assert torch.equal(out[0], torch.zeros(8, 12))
    assert torch.isfinite(out).all()


def test_batches_equal_one_by_one(monkeypatch):
    shapes = [(5, 8, 12), (8, 12), (12, 8), (3, 8, 12)]
    weights, gradients = _problem(*shapes)
    together = _train(Muon, weights, gradients, lr=0.02)
    monkeypatch.setattr(muon_module, "MAX_BATCH_ELEMENTS", 8 * 12)
    apart = _train(Muon, weights, gradients, lr=0.02)
    singles = [
        _train(
            Muon,
            list(w.reshape(-1, *w.shape[-2:])),
            [list(s[i].reshape(-1, *w.shape[-2:])) for s in gradients],
            lr=0.02,
        )
        for i, w in enumerate(weights)
    ]
    for a, b, c in zip(together, apart, singles, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.reshape(-1, *a.shape[-2:]), torch.stack(c), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [(4, 4, 4, 4), (6, 6, 2, 2), (10, 3, 3)])
def test_blocks_are_trained_as_separate_matrices(rows):
    (weight,), gradients = _problem((16, 10))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = Muon([{"params": [parameter], "block_rows": [rows]}], lr=0.02)
    for (gradient,) in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    separate = _train(Muon, list(weight.split(rows)), [list(g.split(rows)) for (g,) in gradients], lr=0.02)
    torch.testing.assert_close(parameter.detach(), torch.cat(separate), rtol=1e-5, atol=1e-6)
    whole = _train(Muon, [weight], gradients, lr=0.02)
    assert not torch.allclose(parameter.detach(), whole[0], atol=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (16, 256), (256, 16), (4, 32, 64)])
def test_update_has_the_size_of_adamw(shape):
    (weight,), gradients = _problem(shape)
    (after,) = _train(Muon, [weight], gradients[:1], lr=1.0, weight_decay=0.0)
    assert (after - weight).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


def test_vector_is_refused():
    with pytest.raises(ValueError, match="AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)

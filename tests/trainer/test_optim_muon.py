"""Muon against torch's own, against exact arithmetic in fp64, and against itself one matrix at a time."""

import pytest
import torch
from bounds import below

from trainer.ops.orthogonalise import iteration, orthogonalise
from trainer.optim import muon as muon_module
from trainer.optim.muon import Muon


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
def test_equals_torch_muon(steps, nesterov, monkeypatch):
    """Both in float32: torch's own iterates in bfloat16, whose rounding is 1% of an update."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    weights, gradients = _problem((24, 40), (40, 24), (16, 16), (24, 40))
    common = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.3}
    ours = _train(
        Muon, weights, gradients[:steps], coefficients="newton_schulz", iteration_dtype=torch.float32, **common
    )
    theirs = _train(torch.optim.Muon, weights, gradients[:steps], adjust_lr_fn="match_rms_adamw", **common)
    for start, a, b in zip(weights, ours, theirs, strict=True):
        # The update itself must agree, not only the weight that dwarfs it.
        below(torch.linalg.norm(a - b), 1e-4 * torch.linalg.norm(b - start))


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
    below(errors[-1], 1e-6)


def _with_singular_values(shape, s):
    generator = torch.Generator().manual_seed(4)
    u, v = (torch.linalg.qr(torch.randn(size, len(s), generator=generator, dtype=torch.float64))[0] for size in shape)
    return (u * s) @ v.T, u, v


@pytest.mark.parametrize("shape", [(32, 40), (32, 256), (256, 32)])
@pytest.mark.parametrize("steps", [5, 9])
@pytest.mark.parametrize("decades", [0, 4, 8])
def test_badly_conditioned_matrices_in_float32(shape, steps, decades):
    """Against the polynomial on exact singular values; the short way over Gram matrices loses the most digits here."""
    s = torch.logspace(0, -decades, 32, dtype=torch.float64)
    x, u, v = _with_singular_values(shape, s)
    per_step, safety = iteration("polar_express", steps)
    s = s / (safety * torch.linalg.norm(s))
    for a, b, c in per_step:
        s = a * s + b * s**3 + c * s**5
    error = orthogonalise(x[None].float(), steps=steps)[0].double() - (u * s) @ v.T
    bound = 1e-3 if steps == 9 else 1e-4 if shape == (32, 40) else 3e-4
    below(torch.linalg.matrix_norm(error, ord=2), bound)


@pytest.mark.parametrize("shape", [(12, 30), (24, 256)])
def test_bfloat16_is_close_to_exact(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5))
    half = orthogonalise(x, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.double(), orthogonalise(x.double(), dtype=torch.float64), rtol=0, atol=1.2e-2
    )  # of 0.2 to 0.3; five steps enlarge
    # the rounding of the input, 2**-9, in the least singular values, and that of the result is as much


@pytest.mark.parametrize("exponent", [-148, -140, -100, -80, -40, 20, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_direction_does_not_depend_on_the_size_of_the_gradient(exponent, dtype):
    """Equal to the last bit; below 2^-126 numbers have fewer digits, so only the remaining digits are compared."""
    small = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(3)) * 2.0**exponent
    near_1 = (small.double() * 2.0**-exponent).float()
    assert torch.equal(orthogonalise(small, dtype=dtype), orthogonalise(near_1, dtype=dtype))


def test_zero_matrix_stays_zero_in_a_batch():
    x = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(6))
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


@pytest.mark.parametrize("rows", [(), (4, 4, 2)])
@pytest.mark.parametrize("shape", [(10, 6), (10, 40)])
def test_teon_is_the_polar_factor_of_the_matrices_side_by_side(rows, shape):
    """Oracle: SVD in fp64 of the concatenation, split again, at √K the rate of one matrix."""
    weights, gradients = _problem(shape, shape)
    parameters = [torch.nn.Parameter(w.double()) for w in weights]
    group = {"params": parameters, "block_rows": [rows] * 2, "stacks": [(0, 1)]}
    lr, steps = 0.02, 12  # enough to converge
    optimizer = Muon([group], lr=lr, weight_decay=0.3, steps=steps, iteration_dtype=torch.float64)
    expected = [w.double() for w in weights]
    momenta = [torch.zeros_like(w) for w in expected]
    for step in gradients[:3]:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.double()
        optimizer.step()
        momenta = [0.95 * m + g.double() for m, g in zip(momenta, step, strict=True)]
        both = torch.cat([g.double() + 0.95 * m for m, g in zip(momenta, step, strict=True)], dim=1)
        parts = []
        for block in both.split(rows or shape[0]):
            u, _, vh = torch.linalg.svd(block, full_matrices=False)
            parts.append(0.2 * max(block.shape) ** 0.5 * u @ vh)
        for index, update in enumerate(torch.cat(parts).split(shape[1], dim=1)):
            expected[index] = expected[index] * (1 - lr * 0.3) - lr * update
    for parameter, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), e, rtol=0, atol=1e-7)


@pytest.mark.parametrize("base", [None, 64])  # at this shape both scales are those of one layer alone
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_stack_moves_each_weight_as_far_as_muon_alone(layers, base):
    weights, gradients = _problem(*[(64, 64)] * layers)
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    group = {"params": parameters, "stacks": [tuple(range(layers))], "spectral_base": base and base * layers**2}
    optimizer = Muon([group], lr=1.0, weight_decay=0.0)
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient
    optimizer.step()
    moved = torch.cat([p.detach() - w for p, w in zip(parameters, weights, strict=True)])
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


def test_bf16_momentum_is_the_rounded_one():
    (weight,), gradients = _problem((24, 40))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = Muon([parameter], lr=0.02, state_dtype=torch.bfloat16)
    expected = torch.zeros(24, 40, dtype=torch.bfloat16)
    for (gradient,) in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        expected = (0.95 * expected.float() + gradient).bfloat16()
    assert torch.equal(optimizer.state[parameter]["momentum"], expected)
    (exact,) = _train(Muon, [weight], gradients, lr=0.02)
    below(torch.linalg.norm(parameter.detach() - exact), 0.02 * torch.linalg.norm(exact - weight))


def test_vector_is_refused():
    with pytest.raises(ValueError, match="AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


# One group each: shapes of its parameters and its options. Blocks of 4 rows are what an expert is in a 3-D tensor.
GROUPS = {
    "matrix": ([(12, 8)], {}),
    "heads": ([(12, 8)], {"block_rows": [(4, 4, 4)]}),
    "experts": ([(3, 4, 8)], {}),
    "stacked": ([(12, 8), (12, 8)], {"block_rows": [(4, 4, 4)] * 2, "stacks": [(0, 1)]}),
}


def _group(kind, **options):
    shapes, group = GROUPS[kind]
    weights, gradients = _problem(*shapes)
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    return parameters, gradients, Muon([{"params": parameters, **group}], lr=1.0, **options)


def _step(optimizer, parameters, gradients):
    """How far each parameter moves."""
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    return [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]


@pytest.mark.parametrize("iteration_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize(
    ("state_dtype", "nesterov", "exponent"),
    [
        (torch.float32, False, -140),  # a sum of such numbers would be rounded, so only without Nesterov
        (torch.float32, True, -110),
        (torch.bfloat16, True, -110),
        (torch.float32, True, 80),
    ],
)
def test_updates_do_not_depend_on_the_size_of_the_momentum(kind, state_dtype, nesterov, exponent, iteration_dtype):
    moved = []
    for scale in (0, -exponent):
        options = {"state_dtype": state_dtype, "iteration_dtype": iteration_dtype, "nesterov": nesterov}
        parameters, gradients, optimizer = _group(kind, **options, weight_decay=0.0)
        small = [gradient * 2.0**exponent for gradient in gradients[0]]
        moved.append(_step(optimizer, parameters, [(gradient.double() * 2.0**scale).float() for gradient in small]))
    for small, usual in zip(*moved, strict=True):
        assert torch.equal(small, usual)
        assert small.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.4)  # few and small matrices


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["heads", "experts", "stacked"])
def test_a_block_without_any_gradient_keeps_still(kind, decay, state_dtype):
    """Its weight decays, as in torch.optim.Muon, its momentum decays, and the other blocks do not notice."""
    parameters, gradients, optimizer = _group(kind, weight_decay=decay, state_dtype=state_dtype)
    optimizer.param_groups[0]["lr"] = lr = 0.01
    first = parameters[0]
    _step(optimizer, parameters, gradients[0])
    momentum = optimizer.state[first]["momentum"].view(12, 8)[4:8].float().clone()
    for number, step in enumerate(gradients[1:], start=1):
        step[0].view(12, 8)[4:8] = 0
        old = first.detach().view(12, 8)[4:8].clone()
        moved = _step(optimizer, parameters, step)
        assert torch.equal(first.detach().view(12, 8)[4:8], old * (1 - lr * decay))
        moved = torch.cat([m.view(12, 8) for m in moved]).view(-1, 4, 8)
        assert (moved.square().mean(dim=(1, 2)).sqrt() > 1e-3).tolist() == [True, False, *[True] * (len(moved) - 2)]
        torch.testing.assert_close(
            optimizer.state[first]["momentum"].view(12, 8)[4:8].float(), momentum * 0.95**number, rtol=0.02, atol=0
        )
    (back,) = _step(optimizer, parameters, gradients[0])[:1]
    assert back.view(12, 8)[4:8].square().mean().sqrt() > 1e-3


def test_a_matrix_of_a_stack_without_any_gradient_has_no_part_in_it():
    """The other member gets the same update as with a matrix of zeros, at the rate of the whole stack."""
    parameters, gradients, optimizer = _group("stacked", weight_decay=0.0)
    _step(optimizer, parameters, gradients[0])
    gradients[1][0].zero_()
    still, moved = _step(optimizer, parameters, gradients[1])
    assert torch.equal(still, torch.zeros(12, 8))
    direction = gradients[1][1] + 0.95 * (gradients[1][1] + 0.95 * gradients[0][1])
    beside = torch.cat([torch.zeros(3, 4, 8), direction.view(3, 4, 8)], dim=2)
    expected = 0.2 * 16**0.5 * orthogonalise(beside)[..., 8:]
    torch.testing.assert_close(-moved.view(3, 4, 8), expected, rtol=0, atol=1e-5)


def test_an_expert_that_starves_keeps_still_until_its_momentum_is_gone():
    """Squares of its momentum vanish after 500 steps, the momentum itself after 1800."""
    generator = torch.Generator().manual_seed(7)
    experts = torch.nn.Parameter(torch.randn(3, 8, 4, generator=generator))
    optimizer = Muon([experts], lr=1e-3, weight_decay=0.0)
    _step(optimizer, [experts], [torch.randn(3, 8, 4, generator=generator)])
    before = experts.detach().clone()
    for _ in range(2000):
        gradient = torch.randn(3, 8, 4, generator=generator)
        gradient[1] = 0
        _step(optimizer, [experts], [gradient])
    assert torch.equal(experts[1], before[1])
    assert torch.isfinite(experts).all() and not torch.equal(experts[0], before[0])
    assert optimizer.state[experts]["momentum"][1].abs().max() < 1e-40

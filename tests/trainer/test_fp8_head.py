"""The cross-entropy with FP8 products against the formula in double precision, and in a model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from trainer.fp8.convert import convert, recipe_of
from trainer.fp8.head import Fp8HeadProducts
from trainer.fp8.state import Fp8State
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.ops.cross_entropy import cross_entropy_sum
from trainer.spec import Fp8Spec
from trainer.specbase import parse

CPU = torch.device("cpu")
TOKENS, HIDDEN, VOCABULARY = 44, 32, 64
FP8 = Fp8Spec(implementation="emulated", head=True)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To FP8 with the scale that takes the largest number to the format's largest, in fp64 again."""
    scale = torch.finfo(dtype).max / x.abs().max().float()
    return (x.float() * scale).to(dtype).double() / scale.double()


def by_formula(h: Tensor, w: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients; rounding has the gradient of what is rounded, and each chunk of tokens its own scales."""
    w8, total = rounded(w, torch.float8_e4m3fn), torch.zeros((), dtype=torch.float64)
    of_h, of_w = [], torch.zeros_like(w, dtype=torch.float64)
    for part, label in zip(h.split(chunk), labels.split(chunk), strict=True):
        h8 = rounded(part, torch.float8_e4m3fn)
        logits = h8 @ w8.T
        counted = label != -100
        total = total + (logits.logsumexp(-1) - logits[torch.arange(len(part)), label.clamp(min=0)])[counted].sum()
        grad = logits.softmax(-1)
        grad[torch.arange(len(part)), label.clamp(min=0)] -= 1
        grad = rounded(grad * counted[:, None], torch.float8_e5m2)
        of_h.append(grad @ w8)
        of_w += grad.T @ h8
    return total, torch.cat(of_h), of_w


def test_loss_and_gradients_equal_the_formula():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, HIDDEN, generator=generator)
    w = torch.randn(VOCABULARY, HIDDEN, generator=generator) / 5
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::7] = -100
    recipe = recipe_of(FP8)
    state = Fp8State(1, recipe, 16, CPU)
    leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    products = partial(Fp8HeadProducts, recipe=recipe, slots=state.slots(0))
    loss = cross_entropy_sum(*leaves, labels, 16, products=products)
    (3 * loss).backward()
    total, of_h, of_w = by_formula(h, w, labels, 16)
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaves[0].grad.double() / 3, of_h, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(leaves[1].grad.double() / 3, of_w, rtol=1e-3, atol=1e-3)
    noted = state.slots(0).amax
    assert noted[0] == h.abs().max() and noted[1] == w.abs().max() and 0 < noted[2] <= 1


def models(fp8: Fp8Spec | None) -> HybridModel:
    spec = parse(
        ModelSpec,
        {
            "vocab_size": VOCABULARY,
            "hidden": HIDDEN,
            "layers": ["-", "-", "-"],
            "mlp": {"width": 64},
            "mtp": {"depth": 1, "layer": "-"},
        },
    )
    model = build_model(spec, device=CPU, seed=0)
    if fp8:
        convert(model, spec, fp8, CPU)
    return model


def run(model: HybridModel) -> tuple[float, Tensor | None]:
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    output = model(ids, torch.zeros_like(ids, dtype=torch.int32), ids.roll(-1, 1))
    if model.training:
        (output.ce_sum + output.mtp_ce_sum_K.sum()).backward()
    return output.ce_sum.item(), model.head.weight.grad


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_model_trains_with_it_and_is_evaluated_without(recipe: str):
    plain, kept = models(None), models(FP8.updated({"recipe": recipe, "head": False}))
    converted = models(FP8.updated({"recipe": recipe}))
    (right, gradient), (without, _), (found, rounded) = run(plain), run(kept), run(converted)
    assert found != without and found == pytest.approx(right, rel=1e-2)
    cosine = torch.cosine_similarity(rounded.flatten(), gradient.flatten(), dim=0)
    assert 0.98 < cosine < 1
    assert run(converted.eval())[0] == run(plain.eval())[0]


def test_a_head_kept_in_higher_precision_changes_nothing():
    assert models(FP8.updated({"head": False})).fp8_head is None and models(None).fp8_head is None

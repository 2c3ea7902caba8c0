"""Scaling laws against minimisation by a grid, and against what their papers state."""

import math

import numpy as np
import pytest

from trainer.arithmetic.scaling import (
    CORRECTED,
    LAWS,
    effective_tokens,
    expected_loss,
    inference_optimum,
    is_extrapolated,
    number,
)
from trainer.errors import SpecError

CHINCHILLA = 5.76e23  # operations of the paper's 70B model on 1.4T tokens


def test_the_corrected_law_gives_about_twenty_tokens_for_each_parameter():
    params, tokens = CORRECTED.optimum(CHINCHILLA)
    assert 17 < tokens / params < 24 and 6 * params * tokens == pytest.approx(CHINCHILLA)
    assert 6e10 < params < 8e10 and 1.2e12 < tokens < 1.6e12
    # As published, the third approach disagreed with the paper's own model, which is what was corrected.
    published = LAWS[1].optimum(CHINCHILLA)
    assert published[1] / published[0] > 50


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("flops", [1e19, 1e22, CHINCHILLA])
def test_the_optimum_is_that_of_a_grid(law, flops: float):
    sizes = np.logspace(6, 13, 200_001)
    losses = law.E + law.A / sizes**law.alpha + law.B / (flops / 6 / sizes) ** law.beta
    params, tokens = law.optimum(flops)
    assert params == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    assert law.loss(params, tokens) == pytest.approx(losses.min(), rel=1e-9)
    assert law.balanced_tokens(params) == pytest.approx(tokens) and law.balanced_params(tokens) == pytest.approx(params)
    assert law.tokens_for(params, law.loss(params, tokens)) == pytest.approx(tokens)


@pytest.mark.parametrize("served", [1e9, 1e12, 1e14])
def test_the_inference_optimum_is_that_of_a_grid(served: float):
    params, tokens = CORRECTED.optimum(1e22)
    target = CORRECTED.loss(params, tokens)
    best, its_tokens = inference_optimum(params, tokens, served)
    sizes = np.logspace(8, 12, 400_001)
    left = target - CORRECTED.E - CORRECTED.A / sizes**CORRECTED.alpha
    with np.errstate(invalid="ignore"):
        cost = np.where(
            left > 0, 6 * sizes * (CORRECTED.B / left) ** (1 / CORRECTED.beta) + 2 * sizes * served, math.inf
        )
    assert best == pytest.approx(sizes[np.nanargmin(cost)], rel=2e-3)
    assert CORRECTED.loss(best, its_tokens) == pytest.approx(target, rel=1e-6)
    assert best < params and its_tokens > tokens, "serving makes smaller models on more tokens worth while"


def test_repeated_tokens_are_worth_less():
    assert effective_tokens(100, 60) == 60
    # The paper: four epochs lose little, sixteen epochs are half of what is possible, and forty give hardly more.
    assert effective_tokens(1.0, 4.0) == pytest.approx(4.0, rel=0.1)
    most = 1 + 15.387756
    assert effective_tokens(1.0, 1.0 + 15.387756) == pytest.approx(1 + 15.387756 * (1 - 1 / math.e))
    assert effective_tokens(1.0, 1000.0) == pytest.approx(most, rel=1e-6)


def test_a_mixture_of_experts_lies_between_both_ends():
    dense = expected_loss([6e8], 15e9)
    both = expected_loss([6e8, 4.2e9], 15e9)
    assert both.low < both.value < dense.value <= dense.high == both.high
    assert dense.value == CORRECTED.loss(6e8, 15e9)


@pytest.mark.parametrize("params", [7e7, 1e9, 3.16e10])
def test_the_range_holds_all_laws_and_two_standard_errors_of_the_floor(params: float):
    found = expected_loss([params], 15e9)
    assert found.low <= found.value - 0.06 + 1e-12 and found.high >= found.value + 0.06 - 1e-12
    assert all(found.low <= law.loss(params, 15e9) <= found.high for law in LAWS)


def test_what_lies_outside_of_the_fitted_runs():
    assert not is_extrapolated([7e7, 1.6e10], 5e11)
    assert is_extrapolated([1e9], 1e12) and is_extrapolated([1e9, 3e10], 1e11) and is_extrapolated([1e7], 1e10)


@pytest.mark.parametrize(
    ("text", "value"), [("15B", 15e9), ("1.5t", 1.5e12), ("3e9", 3e9), ("1,000", 1e3), ("7K", 7e3)]
)
def test_numbers(text: str, value: float):
    assert number(text, "--tokens") == value


@pytest.mark.parametrize("text", ["", "B", "-1", "0", "1X", "nan", "inf", "1e400"])
def test_what_is_no_number(text: str):
    with pytest.raises(SpecError, match=r"--tokens .*: not a positive number; write it like 15B"):
        number(text, "--tokens")

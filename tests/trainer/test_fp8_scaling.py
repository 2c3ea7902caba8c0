"""FP8 casts, bit for bit, against arithmetic in Python's own floats, and the scales against their definition."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from trainer.fp8.scaling import (
    BLOCK,
    E4M3,
    E5M2,
    LARGEST,
    block_scale,
    by_rows,
    by_tensor,
    by_tiles,
    dequantised,
    tensor_scale,
    to_fp8,
)

# exponent bits' bias and mantissa bits of the two formats (OCP 8-bit floating point, revision 1.0)
FORMATS = {E4M3: (7, 3), E5M2: (15, 2)}
ONE = torch.tensor(1.0)


def nearest(value: float, dtype: torch.dtype) -> float:
    """`value` rounded to the format by exact rational arithmetic: nearest, ties to even, saturating."""
    bias, mantissa = FORMATS[dtype]
    if math.isnan(value):
        return value
    clamped = max(-LARGEST[dtype], min(LARGEST[dtype], value))
    exponent = max(math.frexp(clamped)[1] - 1, 1 - bias) if clamped else 1 - bias
    step = Fraction(2) ** (exponent - mantissa)
    return math.copysign(float(round(Fraction(clamped) / step) * step), value)  # round() of a Fraction: ties to even


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of the format, the midpoints between neighbours, and numbers just above and below these."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = codes[codes.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([torch.nextafter(middles, ONE * sign * torch.inf) for sign in (-1, 1)])
    beyond = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 449, 464, 480, 1e6, -1e9, 61439, 61440, 3e38])
    return torch.cat([numbers, middles, beside, beyond])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_casts_round_to_the_nearest_number_of_the_format(dtype):
    values = awkward(dtype)
    expected = torch.tensor([nearest(value, dtype) for value in values.tolist()])
    assert torch.equal(to_fp8(values, ONE, dtype).float(), expected)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_casts_are_torchs_own_within_the_range(dtype):
    values = awkward(dtype)
    inside = values[values.abs() <= LARGEST[dtype]]
    assert torch.equal(to_fp8(inside, ONE, dtype).view(torch.uint8), inside.to(dtype).view(torch.uint8))


def test_what_torch_does_beyond_the_range_and_why_casts_clamp():
    """E5M2 overflows to Inf in torch, E4M3 does not; ours saturates in both and keeps NaN."""
    assert torch.tensor(1e6).to(E5M2).float().isinf() and torch.tensor(1e6).to(E4M3).float() == 448
    assert to_fp8(torch.tensor([1e6, -1e6]), ONE, E5M2).float().tolist() == [57344, -57344]
    assert to_fp8(torch.tensor(torch.nan), ONE, E5M2).float().isnan()


@pytest.mark.parametrize(
    ("amax", "largest", "margin", "scale"),
    [(7.0, 448.0, 0, 64.0), (7.0, 448.0, 3, 8.0), (0.0, 448.0, 0, 1.0), (1e-40, 57344.0, 0, torch.finfo().max)],
)
def test_tensor_scale(amax, largest, margin, scale):
    assert tensor_scale(torch.tensor(amax), largest, margin).item() == scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_block_scale_is_the_largest_power_of_two_that_fits(dtype):
    amax = torch.cat([torch.logspace(-30, 30, 400), torch.tensor([448.0, 449, 57344, 57345, 1.0])])
    expected = [2.0 ** math.floor(math.log2(Fraction(LARGEST[dtype]) / Fraction(a))) for a in amax.tolist()]
    assert block_scale(amax, dtype).tolist() == expected


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(3, 256), (5, 130), (200, 7)])
def test_rows_have_a_scale_for_each_128_numbers(dtype, shape):
    x_MK = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    rows = by_rows(x_MK, dtype)
    restored = dequantised(rows)
    assert rows.inverse.shape == (shape[0], -(-shape[1] // BLOCK)) and rows.data_MK.shape == shape
    for row in range(shape[0]):
        for first in range(0, shape[1], BLOCK):
            block = x_MK[row, first : first + BLOCK]
            scale = 2.0 ** math.floor(math.log2(LARGEST[dtype] / block.abs().max().item()))
            expected = [nearest(value * scale, dtype) / scale for value in block.tolist()]
            assert restored[row, first : first + BLOCK].tolist() == expected


def test_tiles_have_a_scale_for_each_128_by_128():
    w_MK = torch.randn(256, 384) * torch.logspace(-2, 2, 384)
    tiles = by_tiles(w_MK, E4M3)
    assert tiles.inverse.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            at = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            scale = 2.0 ** math.floor(math.log2(448 / w_MK[at].abs().max().item()))
            assert tiles.inverse[i, j] == 1 / scale
            sample = w_MK[at].flatten()[::97]
            expected = [nearest(value * scale, E4M3) / scale for value in sample.tolist()]
            assert dequantised(tiles)[at].flatten()[::97].tolist() == expected
    assert torch.equal(dequantised(tiles.transposed()), dequantised(tiles).t())


def test_relative_error_is_half_a_step():
    """3 mantissa bits: at most 1/16 of a normal number; tensor-wise numbers below amax·2^-14/448 are subnormal."""
    x = torch.randn(1000).abs() + 0.1
    restored = dequantised(by_tensor(x, tensor_scale(x.amax(), 448.0), E4M3))
    assert ((restored - x).abs() / x).max() <= 1 / 16


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("cast", [by_rows, by_tiles])
def test_not_finite_stays_not_finite(bad, cast):
    x_MK = torch.ones(128, 128)
    x_MK[3, 5] = bad
    assert not dequantised(cast(x_MK, E5M2))[3].isfinite().all()
    assert dequantised(by_tensor(x_MK, tensor_scale(x_MK.abs().amax(), 448.0), E4M3)).isnan().any()

"""The nearest (semi-)orthogonal matrix, by a few odd polynomials of the matrix: only products, so fast everywhere.

Shape suffixes: N matrices, m rows, n columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Coefficients = Literal["polar_express", "newton_schulz"]

# Quintic that maximises the slope at zero (Jordan 2024); singular values end anywhere in about 0.7..1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Minimax quintics for five steps (Amsel et al., arXiv 2505.16932), with their safety factor of 1.02 worked in.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# After those five the values are near 1, where this one (Padé, p(1)=1 and p'(1)=p''(1)=0) converges.
POLISH = (1.875, -1.25, 0.375)

# On the Gram matrix alone s steps need 2m²n + (4s-3)m³ multiplications instead of s·(2m²n + m³). But it has the square
# of the condition: what it cannot tell from zero errs by about the rounding times the square of the steps' slope at
# zero, which is 990 for the five above. So it is recomputed before the slope passes a bound. Not in bfloat16.
GRAM_FROM = 2  # columns for each row
GRAM_SLOPE = 50.0

Steps = tuple[tuple[float, float, float], ...]


def iteration(coefficients: Coefficients, steps: int) -> tuple[Steps, float]:
    """(a, b, c) of each step X ← aX + (bG + cG²)X with G = XXᵀ, and the factor on the Frobenius norm before it."""
    if coefficients == "newton_schulz":
        return (NEWTON_SCHULZ,) * steps, 1.0
    return POLAR_EXPRESS[:steps] + (POLISH,) * (steps - len(POLAR_EXPRESS)), 1.02


def orthogonalise(
    x_Nmn: Tensor, coefficients: Coefficients = "polar_express", steps: int = 5, dtype: torch.dtype | None = None
) -> Tensor:
    """The nearest (semi-)orthogonal matrix UVᵀ of each matrix UΣVᵀ, approximately; a zero matrix stays zero.

    Args:
        x_Nmn: a batch of matrices.
        dtype: of the iteration; see `iteration_dtype`.

    Returns:
        [N, m, n] in the iteration's dtype.
    """
    scaled_Nmn = x_Nmn / power_of_two(largest(x_Nmn))[:, None, None]
    return orthogonalise_(scaled_Nmn.to(dtype or iteration_dtype(x_Nmn.device)), coefficients, steps)


def largest(x_Nmn: Tensor) -> Tensor:
    """The largest absolute value in each matrix, [N]."""
    flat_Nk = x_Nmn.flatten(1)
    return torch.maximum(flat_Nk.amax(1), -flat_Nk.amin(1))  # the infinity norm takes five times as long on a CPU


def power_of_two(largest_N: Tensor) -> Tensor:
    """The largest power of two that is at most each value; for values below the normal numbers, 0 among them, the least
    normal number.

    Squares of what is divided by it neither overflow nor vanish, and the division rounds nothing, so that it changes no
    digit of the result of `orthogonalise_`.
    """
    normal_N = largest_N.clamp(min=torch.finfo(largest_N.dtype).tiny)
    return normal_N / (2 * torch.frexp(normal_N).mantissa)


def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, where it is as good and far faster, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Products:
    """The products of a step whose results are symmetric: X ↦ XXᵀ, and G, b, c ↦ bG + cG²."""

    gram: Callable[[Tensor], Tensor]
    polynomial: Callable[[Tensor, float, float], Tensor]


PLAIN = Products(
    lambda x_Nmn: torch.bmm(x_Nmn, x_Nmn.mT),
    lambda gram_Nmm, b, c: torch.baddbmm(gram_Nmm, gram_Nmm, gram_Nmm, beta=b, alpha=c),
)


def orthogonalise_(x_Nmn: Tensor, coefficients: Coefficients, steps: int, products: Products = PLAIN) -> Tensor:
    """As `orthogonalise`, in the dtype of `x_Nmn`, which is overwritten.

    The largest element of a matrix that is not zero is near 1: see `power_of_two`.
    """
    per_step, safety = iteration(coefficients, steps)
    tall = x_Nmn.shape[-2] > x_Nmn.shape[-1]
    x_Nmn = x_Nmn.mT if tall else x_Nmn  # the Gram matrix is then the smaller of the two
    wide = torch.promote_types(x_Nmn.dtype, torch.float32)
    norm_N11 = torch.linalg.matrix_norm(x_Nmn, keepdim=True, dtype=wide).mul_(safety)
    norm_N11.clamp_(min=torch.finfo(wide).tiny)  # guards 0/0 only
    x_Nmn.div_(norm_N11)
    if x_Nmn.dtype == torch.bfloat16 and x_Nmn.device.type == "cpu":
        # Most CPUs have no bfloat16 products; PyTorch's replacement takes ten times as long as float32.
        y_Nmn = _iterate(x_Nmn.float(), per_step, products).bfloat16()
    else:
        y_Nmn = _iterate(x_Nmn, per_step, products)
    return y_Nmn.mT if tall else y_Nmn


def _iterate(x_Nmn: Tensor, per_step: Steps, products: Products) -> Tensor:
    m, n = x_Nmn.shape[-2:]
    if n < GRAM_FROM * m or x_Nmn.dtype == torch.bfloat16:
        for a, b, c in per_step:
            poly_Nmm = products.polynomial(products.gram(x_Nmn), b, c)
            x_Nmn = torch.baddbmm(x_Nmn, poly_Nmm, x_Nmn, beta=a)
        return x_Nmn
    for part in _gram_parts(per_step):
        x_Nmn = _iterate_gram(x_Nmn, part)
    return x_Nmn


def _gram_parts(per_step: Steps) -> list[Steps]:
    """The steps cut where the product of their slopes at zero would pass GRAM_SLOPE."""
    parts: list[Steps] = []
    slope = math.inf
    for step in per_step:
        slope *= step[0]
        if slope > GRAM_SLOPE:
            parts.append(())
            slope = step[0]
        parts[-1] += (step,)
    return parts


def _iterate_gram(x_Nmn: Tensor, per_step: Steps) -> Tensor:
    """The same steps, of which only the first and the last product are as wide as `x_Nmn`.

    A step multiplies X by a polynomial P of G = XXᵀ from the left. P commutes with G, so the next G is PGP, and the
    product of all P, applied once, is what the steps do.
    """
    gram_Nmm = torch.bmm(x_Nmn, x_Nmn.mT)
    product_Nmm: Tensor | None = None
    for number, (a, b, c) in enumerate(per_step, start=1):
        poly_Nmm = torch.baddbmm(gram_Nmm, gram_Nmm, gram_Nmm, beta=b, alpha=c)
        poly_Nmm.diagonal(dim1=-2, dim2=-1).add_(a)
        product_Nmm = poly_Nmm if product_Nmm is None else torch.bmm(poly_Nmm, product_Nmm)
        if number < len(per_step):
            gram_Nmm = torch.bmm(torch.bmm(poly_Nmm, gram_Nmm), poly_Nmm)
    return torch.bmm(product_Nmm, x_Nmn)

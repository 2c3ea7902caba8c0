"""Muon's orthogonalisation with the symmetric products of quack (Dao-AILab, package quack-kernels).

Of XXᵀ and of a polynomial of it one half mirrors the other; quack's kernel computes tiles on one side of the diagonal
and writes each twice, so that both take about half the arithmetic. Its third product, with X, is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.ops import packages
from trainer.ops.orthogonalise import PLAIN, Coefficients, Products, orthogonalise_
from trainer.ops.setting import Setting

KERNEL = "quack.gemm_interface:gemm_symmetric"
ALIGNED = 8  # elements of two bytes in the 16 that its loads take at a time


def orthogonalise_quack(x_Nmn: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """As `orthogonalise_`."""
    aligned = all(size % ALIGNED == 0 for size in x_Nmn.shape[1:])
    return orthogonalise_(x_Nmn, coefficients, steps, Products(_gram, _polynomial) if aligned else PLAIN)


def unsupported(setting: Setting) -> str | None:
    """None on a GPU of compute capability 9.0 in a run in BF16, in which the iteration is, too."""
    if (reason := setting.below(9, 0)) is not None:
        return reason
    if setting.dtype is not torch.bfloat16:
        return "is for runs in bf16"
    return packages.kernel_problem(KERNEL)


def _gram(x_Nmn: Tensor) -> Tensor:
    return packages.kernel(KERNEL).function(x_Nmn, x_Nmn.mT)


def _polynomial(gram_Nmm: Tensor, b: float, c: float) -> Tensor:
    return packages.kernel(KERNEL).function(gram_Nmm, gram_Nmm.mT, C=gram_Nmm, alpha=c, beta=b)

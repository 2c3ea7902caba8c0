"""The products of the cross-entropy (trainer/ops/cross_entropy.py) in FP8: logits, and both of their gradients.

Tensor-wise recipes only. Logits and sums of weight gradients stay FP32. A chunk of tokens has its own scale where the
recipe takes it from the numbers themselves; the weight is cast once for all chunks.

Legend: n tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.fp8.gemm import PRODUCTS
from trainer.fp8.linear import Recipe, Slots, cast
from trainer.fp8.scaling import Scaled


class Fp8HeadProducts:
    """See `Products` of trainer/ops/cross_entropy.py."""

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype, recipe: Recipe, slots: Slots) -> None:
        self._dtype, self._recipe, self._slots = dtype, recipe, slots
        self._product = PRODUCTS[recipe.implementation]
        self._w_VD = self._cast(weight_VD, 1)

    def logits(self, h_nD: Tensor) -> tuple[Tensor, Scaled]:
        h = self._cast(h_nD.to(self._dtype), 0)
        return self._product(h, self._w_VD, torch.float32, fast=True), h

    def of_h(self, grad: Scaled) -> Tensor:
        return self._product(grad, self._w_VD.transposed(), self._dtype, fast=False)

    def of_weight(self, grad: Scaled, h: Scaled) -> Tensor:
        return self._product(grad.transposed(), h.transposed(), torch.float32, fast=False)

    def narrowed(self, grad_nV: Tensor) -> Scaled:
        return self._cast(grad_nV, 2)

    def _cast(self, x: Tensor, slot: int) -> Scaled:
        return cast(x, slot, self._slots.amax, self._slots.scale, self._recipe)

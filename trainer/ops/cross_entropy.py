"""Cross-entropy of the LM head without materialising all logits.

Logits of N tokens × V entries are the largest tensor of training (131 kB a token at V = 32,768 in fp32). Here the
logits, the loss and the gradients are computed for one chunk of tokens at a time, and the logits are dropped. The
backward pass only scales the stored gradients, so nothing is computed twice.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.ops.experts import compute_dtype
from trainer.ops.wide import computed_in

IGNORE = -100


class Products(Protocol):
    """The three products of one head; operands are narrowed once and used for two of them.

    `logits` of a chunk are fp32, `of_h` has the dtype of products, `of_weight` is added up in fp32.
    """

    def logits(self, h_nD: Tensor) -> tuple[Tensor, Any]:
        """The logits [n, V], and h as `of_weight` takes it."""

    def narrowed(self, grad_nV: Tensor) -> Any:
        """The fp32 gradient of the logits as the two others take it."""

    def of_h(self, grad: Any) -> Tensor: ...

    def of_weight(self, grad: Any, h: Any) -> Tensor: ...


class _Plain:
    """In `dtype`, on a CPU by way of fp32 where that is as exact and faster."""

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype) -> None:
        self._dtype, self._wide = dtype, computed_in(dtype, weight_VD.device)
        self._w_VD = self._to(weight_VD)

    def _to(self, x: Tensor) -> Tensor:
        return x.to(self._dtype).to(self._wide)

    def logits(self, h_nD: Tensor) -> tuple[Tensor, Tensor]:
        h_nD = self._to(h_nD)
        return (h_nD @ self._w_VD.T).float(), h_nD

    def narrowed(self, grad_nV: Tensor) -> Tensor:
        return self._to(grad_nV)

    def of_h(self, grad_nV: Tensor) -> Tensor:
        return grad_nV @ self._w_VD

    def of_weight(self, grad_nV: Tensor, h_nD: Tensor) -> Tensor:
        return grad_nV.T @ h_nD


MakeProducts = Callable[[Tensor, torch.dtype], Products]  # of the weight [V, D] and the dtype of products


def cross_entropy_sum(
    h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int = 1024, products: MakeProducts = _Plain
) -> Tensor:
    """Σ of -log softmax(W h)[label] over labels other than -100; a 0-d fp32 tensor. No gradients under no_grad.

    The matrix products run in the autocast dtype when autocast is on, the softmax and all sums over chunks in fp32.

    Args:
        products: computes them otherwise, in FP8 say.
    """
    return _ChunkedCrossEntropy.apply(
        h_ND, weight_VD, labels_N, chunk_tokens, compute_dtype(h_ND), torch.is_grad_enabled(), products
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
        with_gradients: bool,
        make_products: MakeProducts,
    ) -> Tensor:
        # needs_input_grad is true of parameters also under no_grad, and the grad mode is always off in here
        needs_h, needs_weight = (needed and with_gradients for needed in ctx.needs_input_grad[:2])
        grad_h_ND = torch.empty_like(h_ND) if needs_h else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            products = make_products(weight_VD, dtype)
            for start in range(0, h_ND.shape[0], chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                labels_n = labels_N[chunk]
                logits_nV, h = products.logits(h_ND[chunk])
                logp_nV = F.log_softmax(logits_nV, dim=-1)
                total += F.nll_loss(logp_nV, labels_n, ignore_index=IGNORE, reduction="sum")
                if not (needs_h or needs_weight):
                    continue
                counted_n1 = (labels_n != IGNORE)[:, None]
                grad_nV = logp_nV.exp_()
                grad_nV.scatter_add_(
                    1, labels_n.clamp(min=0)[:, None], -torch.ones_like(counted_n1, dtype=torch.float32)
                )
                grad = products.narrowed(grad_nV.mul_(counted_n1))
                if grad_h_ND is not None:
                    grad_h_ND[chunk] = products.of_h(grad)
                if grad_weight_VD is not None:
                    grad_weight_VD += products.of_weight(grad, h)
        ctx.save_for_backward(*(grad for grad in (grad_h_ND, grad_weight_VD) if grad is not None))
        ctx.needs, ctx.weight_dtype = (needs_h, needs_weight), weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = iter(ctx.saved_tensors)
        grad_h_ND = next(stored) * grad if ctx.needs[0] else None
        grad_weight_VD = (next(stored) * grad).to(ctx.weight_dtype) if ctx.needs[1] else None
        return grad_h_ND, grad_weight_VD, None, None, None, None, None

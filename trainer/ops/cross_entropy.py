"""Cross-entropy of the LM head without materialising all logits.

Logits of N tokens × V entries are the largest tensor of training (131 kB a token at V = 32,768 in fp32). Here the
logits, the loss and the gradients are computed for one chunk of tokens at a time, and the logits are dropped. The
backward pass only scales the stored gradients, so nothing is computed twice.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.ops.experts import compute_dtype
from trainer.ops.wide import computed_in

IGNORE = -100


def cross_entropy_sum(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int = 1024) -> Tensor:
    """Σ of -log softmax(W h)[label] over labels other than -100; a 0-d fp32 tensor. No gradients under no_grad.

    The matrix products run in the autocast dtype when autocast is on, the softmax and all sums over chunks in fp32.
    """
    return _ChunkedCrossEntropy.apply(
        h_ND, weight_VD, labels_N, chunk_tokens, compute_dtype(h_ND), torch.is_grad_enabled()
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
    ) -> Tensor:
        # needs_input_grad is true of parameters also under no_grad, and the grad mode is always off in here
        needs_h, needs_weight = (needed and with_gradients for needed in ctx.needs_input_grad[:2])
        grad_h_ND = torch.empty_like(h_ND) if needs_h else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            wide = computed_in(dtype, h_ND.device)
            w_VD = weight_VD.to(dtype).to(wide)
            for start in range(0, h_ND.shape[0], chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                h_nD, labels_n = h_ND[chunk].to(dtype).to(wide), labels_N[chunk]
                logp_nV = F.log_softmax((h_nD @ w_VD.T).float(), dim=-1)
                total += F.nll_loss(logp_nV, labels_n, ignore_index=IGNORE, reduction="sum")
                if not (needs_h or needs_weight):
                    continue
                counted_n1 = (labels_n != IGNORE)[:, None]
                grad_nV = logp_nV.exp_()
                grad_nV.scatter_add_(
                    1, labels_n.clamp(min=0)[:, None], -torch.ones_like(counted_n1, dtype=torch.float32)
                )
                grad_nV = grad_nV.mul_(counted_n1).to(dtype).to(wide)
                if grad_h_ND is not None:
                    grad_h_ND[chunk] = grad_nV @ w_VD
                if grad_weight_VD is not None:
                    grad_weight_VD += grad_nV.T @ h_nD
        ctx.save_for_backward(*(grad for grad in (grad_h_ND, grad_weight_VD) if grad is not None))
        ctx.needs, ctx.weight_dtype = (needs_h, needs_weight), weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = iter(ctx.saved_tensors)
        grad_h_ND = next(stored) * grad if ctx.needs[0] else None
        grad_weight_VD = (next(stored) * grad).to(ctx.weight_dtype) if ctx.needs[1] else None
        return grad_h_ND, grad_weight_VD, None, None, None, None

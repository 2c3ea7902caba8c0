"""The router by Triton kernels of our own (trainer/kernels/router.py), one for each pass.

Both passes are operators, which torch.compile keeps whole. Legend as in `trainer.ops.router`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops import packages
from trainer.ops.router import Routed
from trainer.ops.setting import Setting, interpreted

MODULE = "triton"
MOST = 512  # experts: all scores of a token are in one block of a program


def router_triton(
    logit_SE: Tensor, bias_E: Tensor, top_k: int, scale: float, *, softmax: bool, renormalise: bool
) -> Routed:
    """See `router_reference`; of equal scores the first are chosen, and the best comes first."""
    return Routed(*_router(logit_SE, bias_E, top_k, scale, softmax, renormalise))


def unsupported(setting: Setting) -> str | None:
    """None where the kernels run: a GPU of compute capability 8.0, or Triton's interpreter."""
    if not interpreted(setting.device) and (reason := setting.below(8, 0)) is not None:
        return reason
    moe = setting.model.moe if setting.model else None
    if moe and moe.num_experts > MOST:
        return f"takes up to {MOST} experts, the model has {moe.num_experts}"
    return packages.problem(packages.load(MODULE))


@torch.library.custom_op("yaongi::router", mutates_args=())
def _router(
    logits: Tensor, bias: Tensor, top_k: int, scale: float, softmax: bool, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from trainer.kernels import router

    return router.forward(logits.contiguous(), bias, top_k, scale, softmax=softmax, renormalise=renormalise)


@torch.library.custom_op("yaongi::router_backward", mutates_args=())
def _router_backward(
    scores: Tensor,
    experts: Tensor,
    grad_scores: Tensor | None,
    grad_weights: Tensor,
    scale: float,
    softmax: bool,
    renormalise: bool,
) -> Tensor:
    from trainer.kernels import router

    grad_scores = None if grad_scores is None else grad_scores.contiguous()
    return router.backward(
        scores, experts, grad_scores, grad_weights.contiguous(), scale, softmax=softmax, renormalise=renormalise
    )


@_router.register_fake
def _(logits: Tensor, bias: Tensor, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int64)
    return logits.new_empty(tokens, experts), chosen, logits.new_empty(tokens, top_k), chosen.new_empty(experts)


@_router_backward.register_fake
def _(scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores)


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, experts, _weights, load = output
    _logits, _bias, _top_k, *ctx.options = inputs
    ctx.mark_non_differentiable(experts, load)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, experts)


def _backward(
    ctx: FunctionCtx, grad_scores: Tensor | None, _experts: None, grad_weights: Tensor | None, _load: None
) -> tuple[Tensor | None, ...]:
    scores, experts = ctx.saved_tensors
    if grad_weights is None:
        grad_weights = scores.new_zeros(experts.shape)
    return _router_backward(scores, experts, grad_scores, grad_weights, *ctx.options), None, None, None, None, None


_router.register_autograd(_backward, setup_context=_save)

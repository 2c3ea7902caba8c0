"""The router of a mixture of experts in one kernel each way: scores, biased choice, weights and load of the experts.

In single operations it is a dozen launches over a few megabytes, each far shorter than its launch.

Legend: S tokens, E experts, K chosen experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SCORES = 4096  # of a block; with more of them, registers are not enough
TINY = tl.constexpr(1e-20)  # added to sums of scores, as trainer/ops/router.py does


@triton.jit
def _forward(
    logit_ptr,
    bias_ptr,
    score_ptr,
    expert_ptr,
    weight_ptr,
    load_ptr,
    S,
    E,
    scale,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside = (s[:, None] < S) & (e[None, :] < E)
    at = s[:, None].to(tl.int64) * E + e[None, :]
    if SOFTMAX:
        logit = tl.load(logit_ptr + at, mask=inside, other=float("-inf"))
        # Rows that are no tokens would be -inf less -inf.
        shifted = tl.exp(tl.where(inside, logit - tl.max(logit, axis=1)[:, None], float("-inf")))
        score = tl.where(inside, shifted / tl.sum(shifted, axis=1)[:, None], 0.0)
    else:
        score = tl.where(inside, tl.sigmoid(tl.load(logit_ptr + at, mask=inside, other=0.0)), 0.0)
    tl.store(score_ptr + at, score, mask=inside)
    bias = tl.load(bias_ptr + e, mask=e < E, other=0.0)
    biased = score + bias[None, :]
    biased = tl.where(biased != biased, float("inf"), biased)  # NaN counts as the largest, as in torch.topk
    left = tl.where(e[None, :] < E, biased, float("-inf"))
    chosen = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.int32)
    weight = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.float32)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    taken = tl.zeros((BLOCK_S, BLOCK_E), dtype=tl.int32)
    for place in tl.static_range(K):
        best = tl.argmax(left, axis=1)  # of equal ones the first
        here = e[None, :] == best[:, None]
        value = tl.sum(tl.where(here, score, 0.0), axis=1)
        total += value
        taken += here.to(tl.int32)
        left = tl.where(here, float("-inf"), left)
        now = k[None, :] == place
        chosen = tl.where(now, best[:, None], chosen)
        weight = tl.where(now, value[:, None], weight)
    if RENORMALISE:
        weight = weight / (total[:, None] + TINY)
    place = s[:, None].to(tl.int64) * K + k[None, :]
    stored = (s[:, None] < S) & (k[None, :] < K)
    tl.store(expert_ptr + place, chosen.to(tl.int64), mask=stored)
    tl.store(weight_ptr + place, weight * scale, mask=stored)
    load = tl.sum(tl.where(inside, taken, 0), axis=0)
    tl.atomic_add(load_ptr + e, load.to(tl.int64), mask=e < E)  # integers: the order does not matter


@triton.jit
def _backward(
    score_ptr,
    expert_ptr,
    grad_score_ptr,
    grad_weight_ptr,
    out_ptr,
    S,
    E,
    scale,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    WITH_SCORES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    e = tl.arange(0, BLOCK_E)
    inside = (s[:, None] < S) & (e[None, :] < E)
    at = s[:, None].to(tl.int64) * E + e[None, :]
    score = tl.load(score_ptr + at, mask=inside, other=0.0)
    of_weight = tl.zeros((BLOCK_S, BLOCK_E), dtype=tl.float32)  # gradients of weights, at their experts
    taken = tl.zeros((BLOCK_S, BLOCK_E), dtype=tl.float32)
    for k in tl.static_range(K):
        place = s.to(tl.int64) * K + k
        expert = tl.load(expert_ptr + place, mask=s < S, other=0)
        gradient = tl.load(grad_weight_ptr + place, mask=s < S, other=0.0) * scale
        here = (e[None, :] == expert[:, None]).to(tl.float32)
        of_weight += here * gradient[:, None]
        taken += here
    if RENORMALISE:
        total = tl.sum(taken * score, axis=1) + TINY
        along = tl.sum(of_weight * score, axis=1) / total
        grad = taken * (of_weight - along[:, None]) / total[:, None]
    else:
        grad = of_weight
    if WITH_SCORES:
        grad += tl.load(grad_score_ptr + at, mask=inside, other=0.0)
    if SOFTMAX:
        grad = score * (grad - tl.sum(grad * score, axis=1)[:, None])
    else:
        grad = grad * score * (1.0 - score)
    tl.store(out_ptr + at, grad, mask=inside)


def _block(experts: int) -> tuple[int, int]:
    """Tokens and experts of a block."""
    width = triton.next_power_of_2(experts)
    return max(1, min(32, SCORES // width)), width


def forward(
    logit_SE: Tensor, bias_E: Tensor, top_k: int, scale: float, *, softmax: bool, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `trainer.ops.router.router_reference`, the experts of a token best first. All fp32 and int64, contiguous."""
    tokens, experts = logit_SE.shape
    score_SE = torch.empty_like(logit_SE)
    expert_SK = torch.empty(tokens, top_k, dtype=torch.int64, device=logit_SE.device)
    weight_SK = torch.empty(tokens, top_k, dtype=torch.float32, device=logit_SE.device)
    load_E = torch.zeros(experts, dtype=torch.int64, device=logit_SE.device)
    block_s, block_e = _block(experts)
    _forward[(triton.cdiv(tokens, block_s),)](
        logit_SE, bias_E, score_SE, expert_SK, weight_SK, load_E, tokens, experts, scale,
        K=top_k, SOFTMAX=softmax, RENORMALISE=renormalise, BLOCK_S=block_s,
        BLOCK_E=block_e, BLOCK_K=triton.next_power_of_2(top_k), num_warps=4,
    )  # fmt: skip
    return score_SE, expert_SK, weight_SK, load_E


def backward(
    score_SE: Tensor,
    expert_SK: Tensor,
    grad_score_SE: Tensor | None,
    grad_weight_SK: Tensor,
    scale: float,
    *,
    softmax: bool,
    renormalise: bool,
) -> Tensor:
    """The gradient of the logits, fp32 [S, E]."""
    tokens, experts = score_SE.shape
    out = torch.empty_like(score_SE)
    block_s, block_e = _block(experts)
    _backward[(triton.cdiv(tokens, block_s),)](
        score_SE, expert_SK, score_SE if grad_score_SE is None else grad_score_SE, grad_weight_SK, out,
        tokens, experts, scale,
        K=expert_SK.shape[1], SOFTMAX=softmax, RENORMALISE=renormalise, WITH_SCORES=grad_score_SE is not None,
        BLOCK_S=block_s, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return out

"""Which experts a token goes to: scores of all, the best by score and bias, weights of the chosen, load of each.

The bias decides the choice alone; weights are the scores of the chosen, perhaps divided by their sum, times a factor.
All in fp32.

Legend: S tokens, E experts, K chosen experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.ops.experts import count_choices


class Routed(NamedTuple):
    score_SE: Tensor  # fp32
    expert_SK: Tensor  # int64, in no order
    weight_SK: Tensor  # fp32
    load_E: Tensor  # int64, tokens that chose each expert


def router_reference(
    logit_SE: Tensor, bias_E: Tensor, top_k: int, scale: float, *, softmax: bool, renormalise: bool
) -> Routed:
    """The definition: one chosen expert after the other.

    Args:
        logit_SE: fp32.
        softmax: scores are the softmax of a token's logits, else the sigmoid of each.
        renormalise: weights are divided by the sum of the scores of the chosen.
        scale: factor on the weights.
    """
    exp_SE = torch.exp(logit_SE - logit_SE.amax(-1, keepdim=True))
    score_SE = exp_SE / exp_SE.sum(-1, keepdim=True) if softmax else 1 / (1 + torch.exp(-logit_SE))
    left_SE, chosen = score_SE.detach() + bias_E, []
    for _ in range(top_k):
        chosen.append(left_SE.argmax(-1, keepdim=True))
        left_SE = left_SE.scatter(-1, chosen[-1], -torch.inf)
    expert_SK = torch.cat(chosen, dim=-1)
    weight_SK = score_SE.gather(-1, expert_SK)
    if renormalise:
        weight_SK = weight_SK / (weight_SK.sum(-1, keepdim=True) + 1e-20)
    load_E = torch.stack([(expert_SK == e).sum() for e in range(bias_E.numel())])
    return Routed(score_SE, expert_SK, weight_SK * scale, load_E)


def router_torch(
    logit_SE: Tensor, bias_E: Tensor, top_k: int, scale: float, *, softmax: bool, renormalise: bool
) -> Routed:
    """See `router_reference`."""
    score_SE = logit_SE.softmax(-1) if softmax else torch.sigmoid(logit_SE)
    expert_SK, weight_SK = choose(score_SE, bias_E, top_k, scale, renormalise=renormalise)
    return Routed(score_SE, expert_SK, weight_SK, count_choices(expert_SK.flatten(), bias_E.numel()))


def choose(score_SE: Tensor, bias_E: Tensor, top_k: int, scale: float, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The chosen experts [S, K] int64 and their weights [S, K] fp32."""
    expert_SK = (score_SE.detach() + bias_E).topk(top_k, dim=-1, sorted=False).indices
    chosen_SK = score_SE.gather(-1, expert_SK)
    if renormalise:
        chosen_SK = chosen_SK / (chosen_SK.sum(-1, keepdim=True) + 1e-20)
    return expert_SK, chosen_SK * scale

"""Expert parallelism: each rank of a group holds some experts; tokens are sent to them and back. Dropless.

Every rank sorts its routed copies by expert, sends them to the ranks that hold those experts, runs any backend of
`trainer.ops.experts` on what it has received, and sends the results back, where they are weighted and summed. A rank's
expert gradients so contain the tokens of the whole group.

Legend: S tokens, D hidden, E experts of all ranks, e of this rank, F expert width,
G rows of an expert's first matrix, K experts chosen for each token, R = S·K copies sent, Q copies received, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.ops.experts import by_expert, compute_dtype, dispatch, in_token_order


def run_everywhere(
    x_SD: Tensor,
    up_eGD: Tensor,
    down_eDF: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    activation: str,
    *,
    group: dist.ProcessGroup,
    run_own: Callable[..., Tensor],
) -> Tensor:
    """The experts' function, with this rank's part of the experts, which are split over `group`; a collective of its
    ranks.

    Args:
        run_own: backend that computes the experts of this rank.

    Returns:
        [S, D] in the dtype of x.
    """
    num_own = up_eGD.shape[0]
    routing = by_expert(expert_SK, num_own * group.size())
    sent_Pe = routing.count_E.view(-1, num_own)
    received_Pe = torch.empty_like(sent_Pe)
    dist.all_to_all_single(received_Pe, sent_Pe, group=group)
    sent, received = torch.stack([sent_Pe.sum(1), received_Pe.sum(1)]).tolist()  # the only wait for the device

    x_QD = _AllToAll.apply(dispatch(x_SD.to(compute_dtype(x_SD)), routing), sent, received, group)
    own_Pe = torch.arange(num_own, device=x_SD.device).expand_as(received_Pe)
    expert_Q1 = own_Pe.flatten().repeat_interleave(received_Pe.flatten(), output_size=sum(received))[:, None]
    if nothing := not sum(received):  # one token of zeros, so that every backend and the gradients work as usual
        x_QD, expert_Q1 = F.pad(x_QD, (0, 0, 0, 1)), expert_Q1.new_zeros(1, 1)
    weight_Q1 = torch.ones_like(expert_Q1, dtype=torch.float32)
    y_QD = run_own(x_QD, up_eGD, down_eDF, expert_Q1, weight_Q1, activation)
    y_RD = _AllToAll.apply(y_QD[:0] if nothing else y_QD, received, sent, group)
    y_SKD = in_token_order(y_RD, routing).unflatten(0, expert_SK.shape)
    return torch.bmm(weight_SK.to(y_SKD.dtype)[:, None], y_SKD)[:, 0].to(x_SD.dtype)


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks in order of rank, as many as `sent` says; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
    return y

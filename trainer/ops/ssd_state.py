"""The state-space duality scan (trainer/ops/ssd.py) continued from a state, for texts that grow.

    h_t = exp(dt_t·A) h_{t-1} + dt_t B_t x_tᵀ        y_t = C_tᵀ h_t + D x_t

One position is the recurrence itself; more are computed by chunks, as in `ssd_chunked`. Plain torch, in fp32.

Legend: B rows, T positions, Q positions of a chunk, H = G·R heads, G groups, R heads of a group, P head width,
S = R·P, N state width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 64  # fewer positions than in training, whose chunks suit the products of a GPU


def ssd_extend(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H1: Tensor,
    state_BHPN: Tensor,
    kept_BT: Tensor | None,
) -> Tensor:
    """Outputs at new positions, [B, T, H, P] in the dtype of x. The state, in fp32, is advanced in place.

    Args:
        kept_BT: the positions by which the state is advanced, at the beginning of each row; None: all. The outputs of
            others are right only if all of them lie in one chunk.
    """
    wide_BTHP = x_BTHP.float()
    dtx_BTHP = dt_BTH[..., None] * wide_BTHP
    if x_BTHP.shape[1] == 1:
        assert kept_BT is None
        y_BTHP = _one(dtx_BTHP, dt_BTH, A_H, B_BTGN.float(), C_BTGN.float(), state_BHPN)
    else:
        parts = []
        for start in range(0, x_BTHP.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            kept_BQ = None if kept_BT is None else kept_BT[:, chunk]
            B_BQGN, C_BQGN = B_BTGN[:, chunk].float(), C_BTGN[:, chunk].float()
            parts.append(_chunk(dtx_BTHP[:, chunk], dt_BTH[:, chunk], B_BQGN, C_BQGN, A_H, state_BHPN, kept_BQ))
        y_BTHP = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return y_BTHP.addcmul_(D_H1, wide_BTHP).to(x_BTHP.dtype)


def _one(dtx_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHPN: Tensor) -> Tensor:
    batch, heads, width, size = state_BHPN.shape
    groups = B_BTGN.shape[2]
    state_BHPN.mul_(torch.exp(dt_BTH[:, 0] * A_H)[:, :, None, None])
    state_BGSN = state_BHPN.view(batch, groups, -1, size)
    state_BGSN.addcmul_(dtx_BTHP.reshape(batch, groups, -1, 1), B_BTGN.transpose(1, 2))
    # As a row times a matrix: several times faster than a matrix times a column for batches.
    y_BG1S = torch.bmm(C_BTGN.reshape(-1, 1, size), state_BGSN.flatten(0, 1).transpose(1, 2))
    return y_BG1S.view(batch, 1, heads, width)


def _chunk(
    dtx_BQHP: Tensor,
    dt_BQH: Tensor,
    B_BQGN: Tensor,
    C_BQGN: Tensor,
    A_H: Tensor,
    state_BHPN: Tensor,
    kept_BQ: Tensor | None,
) -> Tensor:
    batch, heads, width, size = state_BHPN.shape
    groups, length = B_BQGN.shape[2], dtx_BQHP.shape[1]
    by_group = (groups, heads // groups)
    state_BGSN = state_BHPN.view(batch, groups, -1, size)
    B_BGQN, C_BGQN = B_BQGN.transpose(1, 2), C_BQGN.transpose(1, 2)
    # Sums of log-decays in fp64, as their differences are used.
    log_BHQ = (dt_BQH.double() * A_H.double()).cumsum(1).transpose(1, 2)
    later_QQ = torch.ones(length, length, dtype=torch.bool, device=dtx_BQHP.device).triu(1)
    decay_BHQQ = (log_BHQ[..., :, None] - log_BHQ[..., None, :]).float().masked_fill_(later_QQ, -math.inf).exp_()
    scores_BG1QQ = (C_BGQN @ B_BGQN.transpose(-1, -2))[:, :, None]
    mix_BHQQ = (decay_BHQQ.unflatten(1, by_group) * scores_BG1QQ).flatten(1, 2)
    dtx_BHQP = dtx_BQHP.transpose(1, 2)
    y_BHQP = mix_BHQQ @ dtx_BHQP
    recalled_BHQP = (C_BGQN @ state_BGSN.transpose(-1, -2)).unflatten(-1, (by_group[1], width))
    recalled_BHQP = recalled_BHQP.transpose(2, 3).reshape(batch, heads, length, width)
    y_BHQP = torch.addcmul(y_BHQP, recalled_BHQP, log_BHQ.exp().float()[..., None])
    if kept_BQ is None:
        to_end_BHQ, all_BH = decay_BHQQ[:, :, -1], log_BHQ[..., -1]
    else:  # what does not stay has a time step of 0
        log_BHQ = (dt_BQH.double() * A_H.double()).masked_fill(~kept_BQ[..., None], 0).cumsum(1).transpose(1, 2)
        all_BH = log_BHQ[..., -1]
        to_end_BHQ = (all_BH[..., None] - log_BHQ).exp().float() * kept_BQ[:, None]
    added_BGSQ = (dtx_BHQP * to_end_BHQ[..., None]).unflatten(1, by_group).permute(0, 1, 2, 4, 3).flatten(2, 3)
    state_BHPN.mul_(all_BH.exp().float()[:, :, None, None])
    state_BGSN.add_(added_BGSQ @ B_BGQN)
    return y_BHQP.transpose(1, 2)

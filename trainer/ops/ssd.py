"""State-space duality scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060), reset at each document.

    h_t = exp(dt_t·A) h_{t-1} + dt_t B_t x_tᵀ        y_t = C_tᵀ h_t + D x_t

`ssd_reference` is that recurrence. `ssd_chunked` cuts time into chunks of Q positions: within a chunk the output is a
masked matrix product, and only one state per chunk is passed on, so there is no loop over time. Decays and states
are fp32.

Legend: B rows, T positions, Z chunks, Q positions of a chunk, H = G·R heads, G groups, R heads of a group,
P head width, S = R·P, N state width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.ops.documents import Documents
from trainer.ops.wide import matmul


def ssd_reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    documents: Documents,
    chunk_size: int,
) -> Tensor:
    """The recurrence, position by position (`chunk_size` has no influence). Returns [B, T, H, P] in the dtype of x."""
    batch, length, heads, width = x_BTHP.shape
    per_group = heads // B_BTGN.shape[2]
    dtype = dt_BTH.dtype
    x_BTHP_wide = x_BTHP.to(dtype)
    state_BHPN = x_BTHP_wide.new_zeros(batch, heads, width, B_BTGN.shape[3])
    outputs = []
    for t in range(length):
        decay_BH = torch.exp(dt_BTH[:, t] * A_H)
        # Not by a decay of 0, because a NaN of the previous document would survive.
        state_BHPN = torch.where(documents.same_BT(1)[:, t, None, None, None], state_BHPN, 0)
        B_BHN = B_BTGN[:, t].to(dtype).repeat_interleave(per_group, dim=1)
        C_BHN = C_BTGN[:, t].to(dtype).repeat_interleave(per_group, dim=1)
        new_BHPN = torch.einsum("bh,bhp,bhn->bhpn", dt_BTH[:, t], x_BTHP_wide[:, t], B_BHN)
        state_BHPN = decay_BH[:, :, None, None] * state_BHPN + new_BHPN
        outputs.append(torch.einsum("bhpn,bhn->bhp", state_BHPN, C_BHN) + D_H[:, None] * x_BTHP_wide[:, t])
    return torch.stack(outputs, dim=1).to(x_BTHP.dtype)


def ssd_chunked(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    documents: Documents,
    chunk_size: int,
) -> Tensor:
    """The same by chunks of `chunk_size` positions; a ragged end is padded with dt = 0, which changes no state."""
    batch, length, heads, width = x_BTHP.shape
    groups = B_BTGN.shape[2]
    by_group = (groups, heads // groups)
    size = min(chunk_size, length)
    chunks = -(-length // size)
    pad = chunks * size - length
    seq_BT = documents.seq_idx_BT
    if pad:
        seq_BT = torch.cat([seq_BT, seq_BT[:, -1:].expand(-1, pad)], dim=1)
    seq_BZQ = seq_BT.view(batch, chunks, size)

    x_BZGQRP = _chunk(x_BTHP, pad, chunks).unflatten(3, by_group).transpose(2, 3)
    dt_BZQH = _chunk(dt_BTH, pad, chunks)
    B_BZGQN = _chunk(B_BTGN, pad, chunks).transpose(2, 3)
    C_BZGQN = _chunk(C_BTGN, pad, chunks).transpose(2, 3)

    # Log-decays are summed in fp64 and counted from the start of each document within the chunk, so that what came
    # before a document cannot reach it, not even as rounding.
    total_BZQH = (dt_BZQH.double() * A_H.double()).cumsum(2)
    start_BZQH = _document_start(seq_BZQ)[..., None].expand(-1, -1, -1, heads)
    base_BZQH = torch.where(start_BZQH > 0, total_BZQH.gather(2, start_BZQH), 0)
    log_BZGQR = (total_BZQH - base_BZQH).float().unflatten(3, by_group).transpose(2, 3)

    # Within a chunk: y_i = Σ_{j ≤ i} (C_i·B_j) exp(log_i - log_j) dt_j x_j over the positions of one document.
    seen_BZ11QQ = (seq_BZQ[:, :, :, None] == seq_BZQ[:, :, None, :]).tril()[:, :, None, None]
    dt_BZGQR = dt_BZQH.unflatten(3, by_group).transpose(2, 3)
    dtx_BZGQRP = dt_BZGQR[..., None] * x_BZGQRP.float()
    log_BZGRQ = log_BZGQR.transpose(3, 4).contiguous()
    dtx_BZGRQP = dtx_BZGQRP.to(x_BTHP.dtype).transpose(3, 4)
    y_BZGQRP = _WithinChunk.apply(dtx_BZGRQP, log_BZGRQ, B_BZGQN, C_BZGQN, seen_BZ11QQ).transpose(3, 4)

    if chunks > 1:
        # What each chunk adds to the state at its end: positions of the document that is open there.
        open_BZ = seq_BZQ[:, :, -1]
        closed_BZ1Q1 = (seq_BZQ != open_BZ[:, :, None])[:, :, None, :, None]
        to_end_BZGQR = (log_BZGQR[:, :, :, -1:] - log_BZGQR).masked_fill(closed_BZ1Q1, -math.inf).exp()
        weighted_BZGQS = (to_end_BZGQR[..., None] * dtx_BZGQRP).flatten(4)
        added_BZGNS = B_BZGQN.float().transpose(-1, -2) @ weighted_BZGQS
        # State before chunk z: Σ over earlier chunks c whose open document still lasts at the end of chunk z - 1.
        kept_B1ZZ = (open_BZ[:, :-1, None] == open_BZ[:, None, :-1]).tril()[:, None]
        sum_BHZ = total_BZQH[:, :-1, -1].cumsum(1).transpose(1, 2)
        carry_BHZZ = (sum_BHZ[..., :, None] - sum_BHZ[..., None, :]).masked_fill(~kept_B1ZZ, -math.inf).exp().float()
        added_BZGNRP = added_BZGNS[:, :-1].unflatten(4, (by_group[1], width))
        state_BZGNRP = torch.einsum("bgrzc,bcgnrp->bzgnrp", carry_BHZZ.unflatten(1, by_group), added_BZGNRP)
        state_BZGNS = F.pad(state_BZGNRP.flatten(4), (0, 0, 0, 0, 0, 0, 1, 0))
        # Positions of the document that was open when the chunk began read that state.
        before_BZ1 = F.pad(open_BZ[:, :-1], (1, 0))[:, :, None]
        foreign_BZ1Q1 = (seq_BZQ != before_BZ1)[:, :, None, :, None]
        decay_BZGQR = log_BZGQR.masked_fill(foreign_BZ1Q1, -math.inf).exp()
        recalled_BZGQRP = (C_BZGQN.float() @ state_BZGNS).unflatten(4, (by_group[1], width))
        y_BZGQRP = torch.addcmul(y_BZGQRP.float(), recalled_BZGQRP, decay_BZGQR[..., None])

    y_BTHP = y_BZGQRP.transpose(2, 3).reshape(batch, chunks * size, heads, width)[:, :length]
    return torch.addcmul(y_BTHP.float(), D_H[:, None], x_BTHP.float()).to(x_BTHP.dtype)


class _WithinChunk(torch.autograd.Function):
    """y = (exp(log_i - log_j) ∘ C Bᵀ) dtx over `seen` pairs; the Q × Q tensors are made in place and few are kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, dtx_GRQP: Tensor, log_GRQ: Tensor, B_GQN: Tensor, C_GQN: Tensor, seen_11QQ: Tensor
    ) -> Tensor:
        decay_GRQQ = (log_GRQ[..., :, None] - log_GRQ[..., None, :]).masked_fill_(~seen_11QQ, -math.inf).exp_()
        mix_GRQQ = decay_GRQQ * _scores(B_GQN, C_GQN)
        ctx.save_for_backward(dtx_GRQP, B_GQN, C_GQN, decay_GRQQ, mix_GRQQ)
        return matmul(mix_GRQQ.to(dtx_GRQP.dtype), dtx_GRQP)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_GRQP: Tensor) -> tuple[Tensor | None, ...]:
        dtx_GRQP, B_GQN, C_GQN, decay_GRQQ, mix_GRQQ = ctx.saved_tensors
        # Once, not in each product; and not as part of what is kept until here.
        grad_GRQP, dtx_GRQP = grad_GRQP.contiguous(), dtx_GRQP.contiguous()
        grad_dtx_GRQP = matmul(mix_GRQQ.to(grad_GRQP.dtype).transpose(-1, -2), grad_GRQP)
        by_scores_GRQQ = matmul(grad_GRQP, dtx_GRQP.transpose(-1, -2)).float().mul_(decay_GRQQ)
        grad_scores_GQQ = by_scores_GRQQ.sum(-3).to(B_GQN.dtype)
        by_log_GRQQ = by_scores_GRQQ.mul_(_scores(B_GQN, C_GQN))
        grad_log_GRQ = by_log_GRQQ.sum(-1) - by_log_GRQQ.sum(-2)
        grad_B_GQN = matmul(grad_scores_GQQ.transpose(-1, -2), C_GQN)
        return grad_dtx_GRQP, grad_log_GRQ, grad_B_GQN, matmul(grad_scores_GQQ, B_GQN), None


def _scores(B_GQN: Tensor, C_GQN: Tensor) -> Tensor:
    """C_i·B_j, [G, 1, Q, Q] in fp32."""
    return matmul(C_GQN, B_GQN.transpose(-1, -2)).float()[..., None, :, :]


def _chunk(tensor: Tensor, pad: int, chunks: int) -> Tensor:
    """[B, T, …] → [B, Z, Q, …], zeros appended to fill the last chunk."""
    if pad:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
    return tensor.unflatten(1, (chunks, -1))


def _document_start(seq_BZQ: Tensor) -> Tensor:
    """[B, Z, Q] int64: where in the chunk the document of each position begins; 0 for one that was open before."""
    begins_BZQ = torch.zeros_like(seq_BZQ, dtype=torch.int64)
    index_Q = torch.arange(seq_BZQ.shape[-1], device=seq_BZQ.device)
    begins_BZQ[..., 1:] = torch.where(seq_BZQ[..., 1:] != seq_BZQ[..., :-1], index_Q[1:], 0)
    return begins_BZQ.cummax(-1).values

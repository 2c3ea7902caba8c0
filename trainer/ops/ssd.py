"""State-space duality scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060), reset at each document.

    h_t = exp(dt_t·A) h_{t-1} + dt_t B_t x_tᵀ        y_t = C_tᵀ h_t + D x_t

`ssd_reference` is that recurrence. `ssd_chunked` cuts time into chunks of Q positions: within a chunk the output is a
masked matrix product, and only one state for each chunk travels on, so there is no loop over time. Decays and states
are fp32.

Legend: B rows, T positions, Z chunks, Q positions of a chunk, H heads, P head width, G groups, N state width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.documents import Documents


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
        if t > 0:
            decay_BH = decay_BH * documents.same_BT(1)[:, t, None]
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
    per_group = heads // groups
    size = min(chunk_size, length)
    chunks = -(-length // size)
    pad = chunks * size - length
    seq_BT = documents.seq_idx_BT
    if pad:
        seq_BT = torch.cat([seq_BT, seq_BT[:, -1:].expand(-1, pad)], dim=1)
    seq_BZQ = seq_BT.view(batch, chunks, size)

    x_BZGRQP = _chunk(x_BTHP, pad, chunks).unflatten(3, (groups, per_group)).permute(0, 1, 3, 4, 2, 5)
    dt_BZHQ = _chunk(dt_BTH, pad, chunks).transpose(2, 3)
    B_BZGQN = _chunk(B_BTGN, pad, chunks).transpose(2, 3)
    C_BZGQN = _chunk(C_BTGN, pad, chunks).transpose(2, 3)

    # Log-decays are summed in fp64 and counted from the start of each document within the chunk, so that what came
    # before a document cannot reach it, not even as rounding.
    total_BZHQ = (dt_BZHQ.double() * A_H.double()[:, None]).cumsum(-1)
    start_BZQ = _document_start(seq_BZQ)[:, :, None].expand(-1, -1, heads, -1)
    base_BZHQ = torch.where(start_BZQ > 0, total_BZHQ.gather(-1, start_BZQ), 0)
    log_BZHQ = (total_BZHQ - base_BZHQ).float()

    # Within a chunk: y_i += Σ_{j ≤ i} (C_i·B_j) exp(log_i - log_j) dt_j x_j over the positions of one document.
    seen_BZ1QQ = (seq_BZQ[:, :, :, None] == seq_BZQ[:, :, None, :]).tril()[:, :, None]
    between_BZHQQ = (log_BZHQ[..., :, None] - log_BZHQ[..., None, :]).masked_fill(~seen_BZ1QQ, -math.inf).exp()
    mix_BZHQQ = between_BZHQQ * dt_BZHQ[..., None, :]
    scores_BZGQQ = (C_BZGQN @ B_BZGQN.transpose(-1, -2)).float()
    mix_BZGRQQ = mix_BZHQQ.unflatten(2, (groups, per_group)) * scores_BZGQQ[:, :, :, None]
    y_BZGRQP = mix_BZGRQQ.to(x_BZGRQP.dtype) @ x_BZGRQP

    if chunks > 1:
        # What each chunk adds to the state at its end: positions of the document that is open there.
        last_BZ1 = seq_BZQ[:, :, -1:]
        to_end_BZHQ = (log_BZHQ[..., -1:] - log_BZHQ).masked_fill(
            (seq_BZQ != last_BZ1)[:, :, None], -math.inf
        ).exp() * dt_BZHQ
        weighted_BZGRQP = to_end_BZHQ.unflatten(2, (groups, per_group))[..., None] * x_BZGRQP.float()
        added_BZGRNP = B_BZGQN.float().transpose(-1, -2)[:, :, :, None] @ weighted_BZGRQP
        # State before chunk z: Σ over earlier chunks c whose open document still lasts at the end of chunk z - 1.
        open_BZ = last_BZ1[:, :-1, 0]
        kept_B1ZZ = (open_BZ[:, :, None] == open_BZ[:, None, :]).tril()[:, None]
        sum_BHZ = total_BZHQ[:, :-1, :, -1].cumsum(1).transpose(1, 2)
        carry_BHZZ = (sum_BHZ[..., :, None] - sum_BHZ[..., None, :]).masked_fill(~kept_B1ZZ, -math.inf).exp().float()
        carry_BGRZZ = carry_BHZZ.unflatten(1, (groups, per_group))
        states_BZGRNP = torch.einsum("bgrzc,bcgrnp->bzgrnp", carry_BGRZZ, added_BZGRNP[:, :-1])
        # Positions of the document that was open when the chunk began read that state.
        reads_BZ1Q = (seq_BZQ[:, 1:] == open_BZ[:, :, None])[:, :, None]
        decay_BZHQ = log_BZHQ[:, 1:].masked_fill(~reads_BZ1Q, -math.inf).exp()
        decay_BZGRQ1 = decay_BZHQ.unflatten(2, (groups, per_group))[..., None]
        recalled_BZGRQP = (C_BZGQN[:, 1:, :, None].float() @ states_BZGRNP) * decay_BZGRQ1
        y_BZGRQP = torch.cat([y_BZGRQP[:, :1], y_BZGRQP[:, 1:] + recalled_BZGRQP.to(y_BZGRQP.dtype)], dim=1)

    y_BTHP = y_BZGRQP.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * size, heads, width)[:, :length]
    return (y_BTHP + D_H[:, None] * x_BTHP).to(x_BTHP.dtype)


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

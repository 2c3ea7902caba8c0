"""SSD scan by the Triton kernels of the mamba_ssm package (state-spaces/mamba, `mamba_chunk_scan_combined`).

Only its `ops.triton` modules are imported: they need no compiled extension, while the package's `__init__` needs one.
Both passes are wrapped as operators, so that torch.compile keeps them whole instead of tracing into autotuned kernels.
The kernels read x, B and C as they lie (last dimension contiguous), dt, A and D in fp32, and `seq_idx` in int32.

Legend as in `trainer.ops.ssd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops import packages
from trainer.ops.documents import Documents
from trainer.ops.setting import Setting, interpreted

MODULE = "mamba_ssm.ops.triton.ssd_combined"


def ssd_mamba_ssm(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    documents: Documents,
    chunk_size: int,
) -> Tensor:
    """See `ssd_reference`. dt arrives after bias and softplus, so the kernels' own are not used."""
    seq_idx_BT = documents.seq_idx_BT.to(torch.int32)
    return _scan(x_BTHP, dt_BTH.float(), A_H.float(), B_BTGN, C_BTGN, D_H.float(), seq_idx_BT, chunk_size)


def unsupported(setting: Setting) -> str | None:
    """None where the kernels run: a GPU of compute capability 8.0, or fp32 in Triton's interpreter."""
    if interpreted(setting.device):
        # Its bf16 is silently wrong: the interpreter computes on NumPy, which has no such type.
        if setting.dtype is not torch.float32:
            return "Triton's interpreter computes fp32 only"
    elif (reason := setting.below(8, 0)) is not None:
        return reason
    return packages.problem(packages.load_without_init(MODULE))


@torch.library.custom_op("yaongi::mamba_ssm_scan", mutates_args=())
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor, chunk_size: int
) -> Tensor:
    kernels: Any = packages.load_without_init(MODULE)
    return kernels._mamba_chunk_scan_combined_fwd(x, dt, A, B, C, chunk_size, D=D, seq_idx=seq_idx)[0]


@torch.library.custom_op("yaongi::mamba_ssm_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    out: Tensor,
    seq_idx: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels: Any = packages.load_without_init(MODULE)
    found = kernels._mamba_chunk_scan_combined_bwd(grad, x, dt, A, B, C, out, chunk_size, D=D, seq_idx=seq_idx)
    return tuple(found[:6])


@_scan.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor, chunk_size: int) -> Tensor:
    return x.new_empty(x.shape)


@_scan_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    out: Tensor,
    seq_idx: Tensor,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in (x, dt, A, B, C, D))


def _save(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, seq_idx, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output, seq_idx)


def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _scan_backward(grad.contiguous(), *ctx.saved_tensors, ctx.chunk_size)
    return *gradients, None, None


_scan.register_autograd(_backward, setup_context=_save)

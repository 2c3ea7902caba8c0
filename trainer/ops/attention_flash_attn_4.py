"""Attention over packed documents by the kernels of flash-attn-4, which are compiled for the card where they run.

Both passes are operators, which torch.compile keeps whole: it could not look into the package. Legend as in
`trainer.ops.attention_varlen`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.ops import packages
from trainer.ops.attention_varlen import MAX_HEAD_DIM, longest, unfit
from trainer.ops.documents import Documents
from trainer.ops.setting import Setting

PACKAGE = "flash-attn-4"
FORWARD = "flash_attn.cute:flash_attn_varlen_func"
BACKWARD = "flash_attn.cute.interface:_flash_attn_bwd"  # what its autograd function calls
MAX_HEAD_DIM_BLACKWELL = 128


def attention_flash_attn_4(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents) -> Tensor:
    """See `attention_reference`."""
    q_XHD, k_XKD, v_XKD = (tensor.flatten(0, 1) for tensor in (q_BTHD, k_BTKD, v_BTKD))
    return _attend(q_XHD, k_XKD, v_XKD, documents.cu_seqlens, longest(q_BTHD))[0].view_as(q_BTHD)


def unsupported(setting: Setting) -> str | None:
    """None where the kernels run: compute capability 9.0, as there is no backward pass for older ones."""
    if (reason := setting.below(9, 0) or unfit(setting)) is not None:
        return reason
    attention = setting.model.attention if setting.model else None
    widest = MAX_HEAD_DIM if setting.below(10, 0) else MAX_HEAD_DIM_BLACKWELL
    if attention and attention.head_dim > widest:
        return f"takes head widths up to {widest} on this GPU, the model has {attention.head_dim}"
    return _missing() or packages.kernel_problem(FORWARD) or packages.kernel_problem(BACKWARD)


def _missing() -> str | None:
    """Make flash_attn.cute importable. flash-attn has the rest of that package, perhaps in another folder, as in an
    image whose base has it; Python would look for `cute` in that one alone."""
    try:
        folder = str(distribution(PACKAGE).locate_file("flash_attn"))
    except PackageNotFoundError:
        return f"{PACKAGE} is not installed"
    package = packages.load("flash_attn")
    if isinstance(package, str):
        return package
    if folder not in package.__path__:
        package.__path__.insert(0, folder)
    return None


@torch.library.custom_op("yaongi::flash_attn_4", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The output, and the logarithms of the softmax's sums [H, X], fp32."""
    out, sums = packages.kernel(FORWARD).function(
        q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
        causal=True, return_lse=True,
    )  # fmt: skip
    return out, sums


@torch.library.custom_op("yaongi::flash_attn_4_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, starts: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    found = packages.kernel(BACKWARD).function(
        q, k, v, out, grad, sums, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest,
        max_seqlen_k=longest,
    )  # fmt: skip
    return found[0], found[1], found[2]


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, starts: Tensor, longest: int
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v))


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.longest = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad.contiguous(), *ctx.saved_tensors, ctx.longest), None, None


_attend.register_autograd(_backward, setup_context=_save)

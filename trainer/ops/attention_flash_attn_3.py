"""Attention over packed documents by FlashAttention 3, whose kernels are for Hopper (compute capability 9).

The Python registry does not have it: it is built from the folder `hopper` of Dao-AILab/flash-attention, and some base
images bring it. It is used where it is installed. Calls follow that folder's flash_attn_interface.py (at 01afd16).
Legend as in `trainer.ops.attention_varlen`.
"""

from __future__ import annotations

from torch import Tensor

from trainer.ops import packages
from trainer.ops.attention_varlen import longest, unfit
from trainer.ops.documents import Documents
from trainer.ops.setting import Setting

PACKAGE = "flash_attn_3"
KERNEL = "flash_attn_interface:flash_attn_varlen_func"


def attention_flash_attn_3(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents) -> Tensor:
    """See `attention_reference`."""
    attend = packages.kernel(KERNEL).function
    q_XHD, k_XKD, v_XKD = (tensor.flatten(0, 1) for tensor in (q_BTHD, k_BTKD, v_BTKD))
    starts, length = documents.cu_seqlens, longest(q_BTHD)
    out = attend(q_XHD, k_XKD, v_XKD, starts, starts, length, length, causal=True)
    y_XHD = out[0] if isinstance(out, tuple) else out  # the first releases also return the sums of the softmax
    return y_XHD.view_as(q_BTHD)


def unsupported(setting: Setting) -> str | None:
    """None on Hopper, where the package can be imported."""
    if (reason := setting.below(9, 0) or unfit(setting)) is not None:
        return reason
    if setting.below(10, 0) is None:
        return "has kernels for compute capability 9.0 only; for this GPU there is flash-attn-4"
    return packages.kernel_problem(KERNEL)

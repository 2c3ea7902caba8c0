"""Routed squared-ReLU experts: y[s] = Σ_k weight[s, k] · down[e] · relu(up[e] · x[s])², e = expert[s, k]. Dropless.

Legend: S tokens, D hidden, E experts, F expert width, K experts chosen for each token, R = S·K routed copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_reference(x_SD: Tensor, up_EFD: Tensor, down_EDF: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Tensor:
    """The definition, one expert after the other. Returns [S, D] in the dtype of x."""
    y_SD = torch.zeros_like(x_SD, dtype=torch.float32)
    for e in range(up_EFD.shape[0]):
        token, slot = torch.where(expert_SK == e)
        hidden = F.linear(x_SD[token], up_EFD[e]).relu().square()
        y_SD = y_SD.index_add(0, token, F.linear(hidden, down_EDF[e]).float() * weight_SK[token, slot, None])
    return y_SD.to(x_SD.dtype)


def experts_grouped(x_SD: Tensor, up_EFD: Tensor, down_EDF: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Tensor:
    """The same with the routed copies sorted by expert and one grouped matrix product for each projection."""
    num_experts, top_k = up_EFD.shape[0], expert_SK.shape[1]
    expert_R = expert_SK.reshape(-1)
    order_R = expert_R.argsort(stable=True)
    ends_E = torch.bincount(expert_R, minlength=num_experts).cumsum(0).to(torch.int32)
    dtype = torch.get_autocast_dtype(x_SD.device.type) if torch.is_autocast_enabled(x_SD.device.type) else x_SD.dtype
    x_RD = x_SD.to(dtype)[order_R // top_k]
    hidden_RF = F.grouped_mm(x_RD, up_EFD.to(dtype).transpose(1, 2), offs=ends_E).relu().square()
    y_RD = F.grouped_mm(hidden_RF, down_EDF.to(dtype).transpose(1, 2), offs=ends_E)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    y_SKD = y_RD[place_R].view(*expert_SK.shape, -1)
    return torch.einsum("skd,sk->sd", y_SKD.float(), weight_SK).to(x_SD.dtype)


def grouped_unsupported(device: torch.device) -> str | None:
    """None where torch has a grouped matrix product, else the reason."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped matrix products need compute capability 8.0"
    return None

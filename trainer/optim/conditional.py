"""A step that the device may find it must skip, after its kernels have been launched: nothing is read on the host.

`skip` is a bool tensor without dimensions on the parameters' device. What a step multiplies becomes a product with 1,
what it adds becomes 0; the arithmetic of a step that is not skipped is the same to the bit.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply in place by a tensor without dimensions."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for dtype, same in by_dtype.items():  # of one dtype with the factor, or a GPU takes them one by one
        torch._foreach_mul_(same, factor.to(dtype))


def unless(skip: Tensor, value: float) -> Tensor:
    """`value`; 1 if the step is skipped. In float64."""
    # A fill: torch.where would copy numbers to the device, for which the host waits.
    return torch.full((), value, dtype=torch.float64, device=skip.device).masked_fill_(skip, 1.0)


def erase_(tensors: list[Tensor], skip: Tensor) -> None:
    """Make all elements 0 if the step is skipped, NaN among them: their bits are multiplied by 0 or 1."""
    scale_([tensor.view(_BITS[tensor.element_size()]) for tensor in tensors], ~skip)

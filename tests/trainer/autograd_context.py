"""Call hand-written autograd functions without autograd's engine, which needs a real GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Context:
    """Replaces autograd's context, for a call with `arguments`."""

    saved_tensors: tuple[Tensor, ...]

    def __init__(self, *arguments: Any) -> None:
        self.needs_input_grad = tuple(isinstance(a, Tensor) and a.is_floating_point() for a in arguments)

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass

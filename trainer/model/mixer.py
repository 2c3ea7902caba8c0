"""The interface of a mixer: how a layer calls it, and what it returns.

Legend: B rows, T positions, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from trainer.model.ready import Ready
from trainer.model.recompute import Recomputed
from trainer.ops import Documents

Functions = Mapping[str, Callable[..., Any]]  # the chosen implementation of each operation (trainer/ops)


class Mixed(NamedTuple):
    y_BTD: Tensor  # added to the residual stream
    aux_loss: Tensor | None = None  # 0-d fp32, summed over rows, already weighted
    load_E: Tensor | None = None  # int64, tokens that chose each expert


class Mixer(Recomputed):
    """One kind of sublayer, made from (model's spec, its own section, functions).

    It has two parts: `project`, its first matrix products, and `mix`, everything after them. The pre-norm and the
    regions marked by `mix` are recomputed under selective checkpointing. `ready` is for generation.
    """

    lora_scale: float = 1.0  # of adapters beside stacks of matrices (trainer/model/lora.py)

    def forward(self, x_BTD: Tensor, norm: Callable[[Tensor], Tensor], ids_BT: Tensor, documents: Documents) -> Mixed:
        """
        Args:
            x_BTD: the residual stream.
            norm: the sublayer's own, of the stream.
            ids_BT: int64 token ids.
        """
        projected = self.region("selective", lambda x_BTD: self.project(norm(x_BTD)), x_BTD)
        return self.mix(*projected, documents)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def mix(self, *projected: Any) -> Mixed:
        """Compute the result from the output of `project` and the documents."""
        raise NotImplementedError

    def ready(self, norm: nn.Module) -> Ready:
        """The same for texts that grow: a function of new positions of the residual stream, a `Step` and the `State` of
        this sublayer with what `Kind.cached` names, which it brings up to date. Has no gradient.

        Args:
            norm: the sublayer's own.
        """
        raise NotImplementedError(f"{type(self).__name__} has no cache for generation")

    def reset_buffers(self, token_classes: list[int] | None) -> None:
        """Fill what is no parameter, at the start of training; `token_classes` are the tokenizer's, if the model
        compresses tokens."""

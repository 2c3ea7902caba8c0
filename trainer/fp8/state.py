"""FP8 state across steps: one slot per operand of each product, all slots of the model in one vector.

During a step slots collect the largest magnitude seen. `finish_step`, once after each optimizer step, makes
the scales of the next step out of it: the largest amax over the ranks (one all-reduce) enters a history of H steps and
the largest of the history gives the scale. A scale of 0 means no history yet; such a tensor is scaled by its own amax
(Transformer Engine uses 1 and loses the gradients of the first step). Other recipes use only the statistics, for the
metrics.

Transformer Engine advances its history at every forward pass; here an entry is an optimizer step, which is the same
without gradient accumulation and does not depend on the micro-batch size otherwise.

Legend: N slots (input, weight, gradient of each product, in this order), H steps of history.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.fp8.linear import Recipe, Slots
from trainer.fp8.scaling import LARGEST, tensor_scale

OPERANDS = ("input", "weight", "gradient")


class Fp8State:
    """Slots of `products` products.

    Attributes:
        scale_N: of the delayed recipe; last_amax_N: of the last finished step; overflows_N: steps in which a tensor
        exceeded the range of its delayed scale, so that its largest values were clamped.
    """

    def __init__(self, products: int, recipe: Recipe, history_steps: int, device: torch.device) -> None:
        self.recipe = recipe
        count = products * len(OPERANDS)
        # Of the step in progress, in separate tensors: autograd counts changes by storage.
        self._amaxes = [torch.zeros(len(OPERANDS), device=device) for _ in range(products)]
        self.scale_N = torch.zeros(count, device=device)
        self.last_amax_N = torch.zeros(count, device=device)
        self.overflows_N = torch.zeros(count, device=device)
        largest = (LARGEST[recipe.forward], LARGEST[recipe.forward], LARGEST[recipe.gradient])
        self._largest_N = torch.tensor(largest, device=device).repeat(products)
        self._history_HN = torch.zeros(history_steps, count, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)

    def slots(self, product: int) -> Slots:
        """The tensors to which a product writes its amaxes and from which it reads its scales."""
        at = slice(product * len(OPERANDS), (product + 1) * len(OPERANDS))
        return Slots(self._amaxes[product], self.scale_N[at])

    @torch.no_grad()
    def finish_step(self) -> None:
        """Turn the amaxes of the step into the scales of the next; all ranks call it."""
        amax_N = torch.cat(self._amaxes)
        torch._foreach_zero_(self._amaxes)
        if self.recipe.scaling == "delayed":
            if dist.is_initialized() and dist.get_world_size() > 1:
                amax_N.nan_to_num_(nan=float("inf"))  # a maximum may lose a NaN
                dist.all_reduce(amax_N, dist.ReduceOp.MAX)
            self._advance(amax_N)
        self.last_amax_N.copy_(amax_N)

    def _advance(self, amax_N: Tensor) -> None:
        self.overflows_N += amax_N * self.scale_N > self._largest_N
        place = self._steps % self._history_HN.shape[0]
        finite_N = torch.where(amax_N.isfinite(), amax_N, 0.0)
        self._history_HN.index_copy_(0, place[None], finite_N[None])
        self._steps += 1
        foreseen_N = self._history_HN.amax(0)
        scale_N = tensor_scale(foreseen_N, self._largest_N, self.recipe.margin)
        self.scale_N.copy_(torch.where(foreseen_N > 0, scale_N, self.scale_N))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything on which the next step depends; empty unless the recipe is delayed. Shares memory, so loading
        fills it."""
        if self.recipe.scaling != "delayed":
            return {}
        return {"history_HN": self._history_HN, "scale_N": self.scale_N, "steps": self._steps}

    @property
    def counted_tensors(self) -> int:
        """Number of slots whose overflows are counted; only delayed scaling can overflow."""
        return len(self.overflows_N) if self.recipe.scaling == "delayed" else 0

    def figures(self) -> tuple[dict[str, float], float]:
        """Largest amax of the last step by operand, and overflows so far. Waits for the device."""
        values = torch.cat([self.last_amax_N.view(-1, len(OPERANDS)).amax(0), self.overflows_N.sum()[None]]).tolist()
        return dict(zip(OPERANDS, values, strict=False)), values[-1]

"""What the sublayers share while new positions are appended to texts whose earlier positions they remember.

Rows may get different numbers of new positions; they are padded on the right. Outputs exist for all positions, and the
states that cannot be rolled back advance by `keep_B` of them only: so a proposed continuation can be computed now and
taken into the states in the next call, once it is known to hold.

Legend: B rows, T new positions, S all positions, K taps of a convolution, C channels.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from trainer.kinds.base import Rotation
from trainer.ops.rotary import turns

State = dict[str, Tensor]  # of one sublayer: views of the rows of this step, changed in place


class Step:
    """
    Args:
        ids_BT: int64 token ids of the new positions.
        lengths: positions that each row had before.
        keep: new positions of each row that stay; None: all T.
        rotation: of the model's queries and keys.

    Attributes:
        uniform: the number of positions before, if it is the same in all rows, else None.
        end: the largest number of positions after the step.
    """

    def __init__(self, ids_BT: Tensor, lengths: list[int], keep: list[int] | None, rotation: Rotation | None) -> None:
        self.ids_BT = ids_BT
        self.new = ids_BT.shape[1]
        self.end = max(lengths) + self.new
        self.uniform = lengths[0] if min(lengths) == max(lengths) else None
        self.keep = None if keep is None or min(keep) == self.new else keep
        self._lengths, self._rotation = lengths, rotation

    @cached_property
    def length_B(self) -> Tensor:
        return torch.tensor(self._lengths, device=self.ids_BT.device)

    @cached_property
    def at_BT(self) -> Tensor:
        """The position of each new token in its text, int64."""
        return self.length_B[:, None] + torch.arange(self.new, device=self.ids_BT.device)

    @cached_property
    def keep_B(self) -> Tensor:
        return torch.tensor(self.keep, device=self.ids_BT.device)

    @cached_property
    def kept_BT(self) -> Tensor | None:
        """Which new positions stay, bool; None: all."""
        if self.keep is None:
            return None
        return torch.arange(self.new, device=self.ids_BT.device) < self.keep_B[:, None]

    @cached_property
    def turns_BT1W(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine by which queries and keys are turned (trainer/ops/rotary.py)."""
        assert self._rotation is not None
        return turns(self.at_BT, self._rotation)

    @cached_property
    def seen_B1TS(self) -> Tensor | None:
        """Which positions each new one attends to, bool; None: all of them, as one new position at the end does."""
        if self.new == 1 and self.uniform is not None:
            return None
        index_S = torch.arange(self.end, device=self.ids_BT.device)
        return (index_S <= self.at_BT[:, :, None])[:, None]

    def joined(self, before_BKC: Tensor, new_BTC: Tensor) -> Tensor:
        """What a sublayer remembered, followed by the new positions [B, K + T, C]; remembers the last K that stay."""
        both_BSC = torch.cat([before_BKC, new_BTC.to(before_BKC.dtype)], dim=1)
        length = before_BKC.shape[1]
        if self.keep is None:
            before_BKC.copy_(both_BSC[:, both_BSC.shape[1] - length :])
        else:
            index_BK = self.keep_B[:, None] + torch.arange(length, device=both_BSC.device)
            row_B1 = torch.arange(both_BSC.shape[0], device=both_BSC.device)[:, None]
            before_BKC.copy_(both_BSC[row_B1, index_BK])
        return both_BSC


def convolved(both_BSC: Tensor, w_KC: Tensor, bias_C: Tensor | None, new: int, dilation: int = 1) -> Tensor:
    """A causal depthwise convolution (trainer/ops/conv.py) of positions that have all their taps in front of them.

    Args:
        w_KC: the filters by tap; contiguous, which halves the time of a single position.
    """
    w_KC = w_KC.to(both_BSC.dtype)
    if new == 1:
        y_BTC = (both_BSC[:, ::dilation] * w_KC).sum(1, keepdim=True)
    else:
        y_BTC = both_BSC[:, :new] * w_KC[0]
        for tap in range(1, len(w_KC)):
            y_BTC.addcmul_(both_BSC[:, tap * dilation : tap * dilation + new], w_KC[tap])
    return y_BTC if bias_C is None else y_BTC.add_(bias_C.to(y_BTC.dtype))

"""Document boundaries in packed rows: computed once per batch, shared by all layers.

Equal `seq_idx` in one row means the same document. Documents are contiguous, so two positions of one document have
nothing of another document between them; every mask below relies on that.

Legend: B rows, T positions of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from trainer.kinds.base import Rotation
from trainer.ops.rotary import turns


class Documents:
    """Document ids of a batch of packed rows, with the masks that operations derive from them (each built once).

    Args:
        seq_idx_BT: integer document id of each position; a change of value starts another document.
        at_most: how many documents there are at most, if the host knows it, so that it need not ask the device.
        any: these tensors will hold other documents, too, so nothing may be decided by those that they hold now.
    """

    def __init__(self, seq_idx_BT: Tensor, at_most: int | None = None, *, any: bool = False) -> None:
        self.seq_idx_BT = seq_idx_BT
        self._at_most = at_most
        self._any = any
        self._same: dict[int, Tensor] = {}
        self._added: dict[torch.dtype, Tensor] = {}
        self._turns: tuple[Tensor, Tensor] | None = None

    @classmethod
    def one_per_row(cls, batch: int, length: int, device: torch.device | str = "cpu") -> Documents:
        return cls(torch.zeros(batch, length, dtype=torch.int32, device=device))

    def same_BT(self, shift: int) -> Tensor:
        """[B, T] bool: position t - shift exists in the row and belongs to the document of t."""
        if shift not in self._same:
            same_BT = torch.zeros_like(self.seq_idx_BT, dtype=torch.bool)
            same_BT[:, shift:] = (
                self.seq_idx_BT[:, shift:] == self.seq_idx_BT[:, : max(self.seq_idx_BT.shape[1] - shift, 0)]
            )
            self._same[shift] = same_BT
        return self._same[shift]

    def prepare(
        self, shifts: Iterable[int], *, mask: torch.dtype | None, rotation: Rotation | None, starts: bool
    ) -> None:
        """Compute now what the layers will need: compiled layers may read these, but new attributes would recompile
        them.

        Args:
            shifts: of `same_BT`; mask: dtype of `added_mask_B1TT`, None for none; rotation: of `turns_BT1W`; starts:
            whether `cu_seqlens` is wanted.
        """
        for shift in shifts:
            self.same_BT(shift)
        if mask is not None:
            self.added_mask_B1TT(mask)
        if rotation is not None:
            self.turns_BT1W(rotation)
        _ = starts and self.cu_seqlens

    def turns_BT1W(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Cosine and sine by which queries and keys are turned; one for all layers, as a model has one rotation."""
        if self._turns is None:
            self._turns = turns(self.position_BT, rotation)
        return self._turns

    @cached_property
    def causal_mask_BTT(self) -> Tensor:
        """[B, T, T] bool: query t may see key s, that is s ≤ t and both lie in one document."""
        same_BTT = self.seq_idx_BT[:, :, None] == self.seq_idx_BT[:, None, :]
        return same_BTT.tril()

    def added_mask_B1TT(self, dtype: torch.dtype) -> Tensor:
        """The same as a term of the scores: 0 where the key is seen, else -∞; one for all heads and layers."""
        if dtype not in self._added:
            mask_B1TT = self.causal_mask_BTT[:, None]
            self._added[dtype] = torch.zeros_like(mask_B1TT, dtype=dtype).masked_fill_(~mask_B1TT, -math.inf)
        return self._added[dtype]

    @property
    def whole_rows(self) -> bool:
        """Whether every row is known to be one document; not checked on a GPU, because the host would wait for it.

        A compiled layer uses the general code, else it would be compiled once for each answer.
        """
        asked = self.seq_idx_BT.device.type == "cpu" and not self._any and not torch.compiler.is_compiling()
        return asked and self._is_whole

    @cached_property
    def _is_whole(self) -> bool:
        return bool((self.seq_idx_BT == self.seq_idx_BT[:, :1]).all())

    @cached_property
    def position_BT(self) -> Tensor:
        """int64: how many positions of its document come before each position in its row."""
        index_T = torch.arange(self.seq_idx_BT.shape[1], device=self.seq_idx_BT.device)
        return index_T - torch.where(self.same_BT(1), 0, index_T).cummax(dim=1).values

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32: where each document begins when all rows are laid end to end, then B·T as often as fills the length.

        Without `at_most` the host learns their number here (one wait for the GPU in a micro-batch). It is rounded up to
        a power of two by empty documents at the end, so that few lengths occur.
        """
        begins_X, total = ~self.same_BT(1).flatten(), self.seq_idx_BT.numel()
        count = int(begins_X.sum()) if self._at_most is None else self._at_most
        capacity = 1 << (count - 1).bit_length()
        index_X = torch.arange(total, dtype=torch.int32, device=begins_X.device)
        cu_seqlens = torch.full((capacity + 1,), total, dtype=torch.int32, device=begins_X.device)
        # What begins no document writes B·T, to the last place, which has that already.
        place_X = torch.where(begins_X, begins_X.cumsum(0) - 1, capacity)
        return cu_seqlens.scatter_(0, place_X, index_X.masked_fill(~begins_X, total))

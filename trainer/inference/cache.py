"""The states of texts that grow, by sublayer, and passes of the model that continue them.

Each kind of layer says what it keeps (`Kind.cached`): attention keys and values of all positions, Mamba-2 and Engram a
constant amount. All of it is allocated at once, so what fits at the start fits at the end.

The rows in use are always the first ones, so that a pass works on slices, without copies.

Legend: B rows, T new positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.arithmetic.states import cached_sections
from trainer.model.hybrid import HybridModel
from trainer.model.norm import RMSNorm
from trainer.model.ready import Ready, normed
from trainer.model.step import State, Step
from trainer.ops.experts import compute_dtype

Lengths = list[int]


class Cache:
    """
    Args:
        rows: texts at the same time.
        length: positions of the longest text.
        drafts: also for the first module of multi-token prediction.
    """

    def __init__(self, model: HybridModel, rows: int, length: int, *, drafts: bool = False) -> None:
        stream = model.no_tokens
        dtypes = {"activation": compute_dtype(stream), "fp32": torch.float32, "int64": torch.int64}
        self.model, self.rows, self.length = model, rows, length
        self._states: list[State] = []
        self._growing: set[tuple[int, str]] = set()  # index of the state and name, of tensors with all positions
        for section in cached_sections(model.spec, drafts=drafts):
            state: State = {}
            for name, shape, per_position, dtype in section.cached(model.spec):
                sizes = (rows, shape[0], length, *shape[1:]) if per_position else (rows, *shape)
                state[name] = torch.zeros(sizes, dtype=dtypes[dtype], device=stream.device)
                if per_position:
                    self._growing.add((len(self._states), name))
            self._states.append(state)
        self._rotation = next((section.rotation for section in model.spec.used() if section.rotation), None)
        self._sublayers = [each.mixer.ready(each.norm) for layer in model.layers for each in layer]
        self._ahead = [each.mixer.ready(each.norm) for each in model.mtp[0].layer] if drafts else []
        self._views: dict[int, list[State]] = {}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for state in self._states for tensor in state.values())

    def extend(self, ids_BT: Tensor, first: int, lengths: Lengths, keep: Lengths | None = None) -> Tensor:
        """The residual stream after the last layer at new positions of rows `first`, `first` + 1, …; [B, T, D].

        Args:
            ids_BT: int64, padded on the right.
            lengths: positions that these rows hold already.
            keep: how many of the new positions their states take in; None: all.
        """
        model, step = self.model, Step(ids_BT, lengths, keep, self._rotation)
        x_BTD = model.embedding(ids_BT)
        if compute_dtype(x_BTD) == torch.bfloat16:
            x_BTD = x_BTD.bfloat16()  # as in training
        states = self._of(first, ids_BT.shape[0])
        return self._through(self._sublayers, states, x_BTD, step)

    def draft(
        self, h_BTD: Tensor, ids_BT: Tensor, first: int, lengths: Lengths, keep: Lengths | None, *, last: bool = False
    ) -> Tensor:
        """Logits [B, T, V] of the token two places after each position, by the first module of multi-token prediction.

        Args:
            h_BTD: what `extend` returned at these positions.
            ids_BT: the token after each of them. Otherwise as `extend`.
            last: only those of the last position that stays, [B, 1, V]; of a whole prompt they would be large.
        """
        model, module = self.model, self.model.mtp[0]
        token_BTD = model.embedding(ids_BT)
        parts = module.hidden_norm.without_gradient(h_BTD), module.token_norm.without_gradient(token_BTD)
        x_BTD = module.proj(torch.cat(parts, dim=-1))
        states = self._of(first, ids_BT.shape[0])[len(self._sublayers) :]
        x_BTD = self._through(self._ahead, states, x_BTD, Step(ids_BT, lengths, keep, self._rotation))
        if last:
            counts = keep or [ids_BT.shape[1]] * len(lengths)
            x_BTD = x_BTD[range(len(counts)), [count - 1 for count in counts]][:, None]
        return self.logits(x_BTD, module.head_norm)

    def logits(self, h_BTD: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """FP32 logits of the next token, for what `extend` returned. `norm`: another one in front of the head."""
        model = self.model
        return model.logits(model.readout(normed(norm or model.final_norm), h_BTD)).float()

    def clear(self, first: int, rows: int) -> None:
        """Make rows new. Keys and values may stay: nothing sees them before they are overwritten."""
        for n, state in enumerate(self._of(first, rows)):
            for name, tensor in state.items():
                if (n, name) not in self._growing:
                    tensor.zero_()

    def move(self, source: int, target: int, length: int) -> None:
        """Put the row `source`, of `length` positions, in the place of row `target`."""
        for n, state in enumerate(self._states):
            for name, tensor in state.items():
                if (n, name) in self._growing:
                    tensor[target, :, :length] = tensor[source, :, :length]
                else:
                    tensor[target] = tensor[source]

    def _of(self, first: int, rows: int) -> list[State]:
        """Views of the states of some rows; those of the first rows are made once, as every pass needs them."""
        if first == 0 and rows in self._views:
            return self._views[rows]
        found = [{name: tensor[first : first + rows] for name, tensor in s.items()} for s in self._states]
        if first == 0:
            self._views[rows] = found
        return found

    def _through(self, sublayers: list[Ready], states: list[State], x_BTD: Tensor, step: Step) -> Tensor:
        for extend, state in zip(sublayers, states, strict=False):
            x_BTD.add_(extend(x_BTD, step, state))
        return x_BTD

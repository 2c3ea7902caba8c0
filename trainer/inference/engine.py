"""Continue many texts at once: new ones join and finished ones leave between any two tokens (continuous batching).

Rows of the cache: first the texts that get one token in each pass, then those whose prompts are still being read.

With `drafts`, the first module of multi-token prediction proposes the token after the next, and the model checks it in
the same pass in which it reads the next one (speculative decoding, Leviathan et al., arXiv 2211.17192). States of
Mamba-2 cannot be rolled back, so a proposal never enters them: accepted tokens are read again in the next pass, which
then takes them in. Only greedy texts get proposals, and every token is the model's own choice.

Legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.tokenizer import Tokenizer
from trainer.errors import SpecError
from trainer.inference.cache import Cache
from trainer.inference.sampling import Sampling, choose
from trainer.inference.text import Text, TokenLogprobs
from trainer.model.hybrid import HybridModel

PREFILL_TOKENS = 2048


class Row:
    """A text in the cache."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.length = 0  # positions in the states
        self.drafts: list[int] = []  # proposed continuation of text.ids

    @property
    def pending(self) -> list[int]:
        """Tokens that the states have not taken in yet."""
        return self.text.ids[self.length :]


class Engine:
    """
    Args:
        tokenizer: for texts and stop strings; None: only ids.
        rows: texts at the same time; others wait.
        length: tokens of the longest text, including its prompt.
        drafts: propose tokens by multi-token prediction.
        prefill_tokens: tokens of prompts in one pass, including padding; bounds memory and the pause of other texts.

    Attributes:
        proposed, accepted: proposals so far, and those that were right.
        passes: of the model so far that gave each running text at least one token.

    Raises:
        SpecError: `drafts` without multi-token prediction in the model.
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer: Tokenizer | None = None,
        *,
        rows: int,
        length: int,
        drafts: bool = False,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        if drafts and not model.mtp:
            raise SpecError("the model has no multi-token prediction (train.model.mtp), which proposes tokens")
        self.model, self.tokenizer, self.length, self.rows = model, tokenizer, length, rows
        self.drafts, self.prefill_tokens = drafts, prefill_tokens
        self.waiting: deque[Text] = deque()
        self.proposed = self.accepted = self.passes = 0
        self._device = model.no_tokens.device
        # One position more than the longest text, for a proposal; one row more, to exchange two others.
        self.cache = Cache(model, rows + 1, length + 1, drafts=drafts)
        self._running: list[Row] = []
        self._reading: list[Row] = []

    @property
    def running(self) -> int:
        """Texts in the cache."""
        return len(self._running) + len(self._reading)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """
        Raises:
            SpecError: a prompt is empty, or text and continuation would be too long.
        """
        if not prompt:
            raise SpecError("the prompt is empty; give it at least one character")
        if len(prompt) + sampling.max_tokens > self.length:
            raise SpecError(
                f"the prompt has {len(prompt)} tokens and {sampling.max_tokens} are to be written, but a text may have "
                f"{self.length}; shorten the prompt or ask for fewer tokens"
            )

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Text:
        """A text that `step` will continue. Raises as `check`."""
        self.check(prompt, sampling)
        text = Text(prompt, sampling, self.tokenizer)
        self.waiting.append(text)
        return text

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """Read some tokens of new prompts, and give every text whose prompt has been read at least one token.

        Returns the texts that got a token or ended. Those that were cancelled (`Text.cancel`) leave.
        """
        self._leave()
        going = list(self._running)
        changed = self._read()
        if going:
            changed += self._continue(len(going))
        self._leave()
        return changed

    def run(self) -> None:
        """Until all texts have ended."""
        while self.busy:
            self.step()

    def _read(self) -> list[Text]:
        """One pass over tokens of prompts."""
        self._admit()
        rows, first = self._reading, len(self._running)
        if not rows:
            return []
        # Padding is written behind a row as well, so it must not reach beyond the cache.
        room = min(self.cache.length - row.length for row in rows)
        length = min(max(len(row.pending) for row in rows), max(1, self.prefill_tokens // len(rows)), room)
        keep = [min(length, len(row.pending)) for row in rows]
        lengths = [row.length for row in rows]
        h_BTD = self.cache.extend(self._padded([row.pending[:length] for row in rows]), first, lengths, keep)
        for row, count in zip(rows, keep, strict=True):
            row.length += count
        ends = [b for b, row in enumerate(rows) if not row.pending]
        if ends:
            last_BD = h_BTD[ends, [keep[b] - 1 for b in ends]]
            self._choose(last_BD[:, None], [rows[b] for b in ends])
        if self.drafts:
            after = [row.text.ids[at + 1 : at + 1 + n] for row, at, n in zip(rows, lengths, keep, strict=True)]
            self._propose(h_BTD, after, first, lengths, keep)
        done = [rows[b] for b in ends]
        for row in done:
            self._begin(row)
        return [row.text for row in done]

    def _admit(self) -> None:
        """Give free rows of the cache to texts that wait, in their order."""
        longest = max((len(row.pending) for row in self._reading), default=0)
        while self.waiting and self.running < self.rows:
            longest = max(longest, len(self.waiting[0].ids))
            if self._reading and longest * (len(self._reading) + 1) > self.prefill_tokens:
                return
            self.cache.clear(self.running, 1)
            self._reading.append(Row(self.waiting.popleft()))

    def _begin(self, row: Row) -> None:
        """Put a row whose prompt has been read behind the running ones."""
        at, to = len(self._running) + self._reading.index(row), len(self._running)
        if at != to:
            other = self._reading[0]
            self._move(other, to, self.rows)
            self._move(row, at, to)
            self._move(other, self.rows, at)
            self._reading[at - to] = other
        self._reading.pop(0)
        self._running.append(row)

    def _continue(self, num_rows: int) -> list[Text]:
        """One pass for the first rows, which have been read."""
        rows = self._running[:num_rows]
        before = [len(row.text.ids) for row in rows]
        pending = [row.pending for row in rows]
        lengths, keep = [row.length for row in rows], [len(tokens) for tokens in pending]
        h_BTD = self.cache.extend(
            self._padded([tokens + row.drafts for tokens, row in zip(pending, rows, strict=True)]), 0, lengths, keep
        )
        self.passes += 1
        if h_BTD.shape[1] == 1:
            last_B1D = h_BTD
        else:
            last_B1D = h_BTD[range(num_rows), [count - 1 for count in keep]][:, None]
        self._choose(last_B1D, rows)
        for row, count in zip(rows, keep, strict=True):
            row.length += count
        if not self.drafts:
            return [row.text for row in rows]
        self.proposed += sum(len(row.drafts) for row in rows)
        right = [b for b, row in enumerate(rows) if row.drafts and row.text.ids[before[b] :] == row.drafts]
        right = [b for b in right if rows[b].text.ended is None]
        if right:
            self.accepted += len(right)
            self._choose(h_BTD[right, [keep[b] for b in right]][:, None], [rows[b] for b in right])
        # The module reads the positions whose next tokens are known now, beginning with the last one of before.
        after = [row.text.ids[n:] for row, n in zip(rows, before, strict=True)]
        new = [max(1, len(tokens)) for tokens in after]
        index_BT = torch.tensor([[min(k - 1 + t, h_BTD.shape[1] - 1) for t in range(max(new))] for k in keep])
        h_BTD = h_BTD[torch.arange(num_rows)[:, None], index_BT]
        self._propose(h_BTD, after, 0, [n - 1 for n in before], new)
        return [row.text for row in rows]

    def _propose(self, h_BTD: Tensor, after: list[list[int]], first: int, lengths: list[int], keep: list[int]) -> None:
        """Let the module read positions, given the token after each, and keep its proposals of the last ones."""
        ids_BT = self._padded([tokens + [0] * (n - len(tokens)) for tokens, n in zip(after, keep, strict=True)])
        logits_B1V = self.cache.draft(h_BTD, ids_BT, first, lengths, keep, last=True)
        rows = [*self._running, *self._reading][first : first + len(keep)]
        proposals = logits_B1V[:, 0].argmax(-1).tolist()
        for row, token in zip(rows, proposals, strict=True):
            text = row.text
            fits = len(text.made) + 2 <= text.sampling.max_tokens
            row.drafts = [token] if text.sampling.greedy and text.made and fits else []

    def _choose(self, h_B1D: Tensor, rows: list[Row]) -> None:
        """Append the next token to each text, given the residual stream at its end."""
        logits_BV = self.cache.logits(h_B1D)[:, 0]
        texts = [row.text for row in rows]
        given = logits_BV.clone() if any(text.sampling.logprobs is not None for text in texts) else logits_BV
        tokens = choose(
            logits_BV,
            [text.sampling for text in texts],
            [text.ids for text in texts],
            [text.generator for text in texts],
        )
        for b, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            if text.sampling.logprobs is not None:
                text.logprobs.append(_logprobs(given[b], token, text.sampling.logprobs))
            text.push(token)

    def _leave(self) -> None:
        """Remove texts that have ended, so that the others are the first rows again."""
        self.waiting = deque(text for text in self.waiting if text.ended is None)
        for rows, offset in ((self._reading, len(self._running)), (self._running, 0)):
            for at in reversed(range(len(rows))):
                if rows[at].text.ended is None:
                    continue
                last = rows.pop()
                if at < len(rows):
                    self._move(last, offset + len(rows), offset + at)
                    rows[at] = last
                if rows is self._running and self._reading:  # fill the gap between the two
                    moved = self._reading.pop()
                    self._move(moved, len(self._running) + 1 + len(self._reading), len(self._running))
                    self._reading.insert(0, moved)

    def _move(self, row: Row, source: int, target: int) -> None:
        self.cache.move(source, target, len(row.text.ids))

    def _padded(self, rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self._device)


def _logprobs(logits_V: Tensor, token: int, alternatives: int) -> TokenLogprobs:
    logprob_V = logits_V.log_softmax(-1)
    top = logprob_V.topk(alternatives) if alternatives else None
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else []
    return TokenLogprobs(token, float(logprob_V[token]), pairs)

"""A text while it is generated: its tokens, and the part of it that can be shown already."""

from __future__ import annotations

import time
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from trainer.data.tokenizer import Tokenizer
from trainer.inference.sampling import Sampling

Ending = Literal["stop", "length", "cancelled"]


class TokenLogprobs(NamedTuple):
    """Log-probability of a token under the model itself, before temperature and filters, and the likeliest tokens'."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Decoder:
    """Characters from tokens, one token at a time. Bytes of a character that is not complete yet are held back; at the
    beginning, those of a character that began before are left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = getincrementaldecoder("utf-8")("replace")
        self._lead = 0  # bytes at the beginning that continue a character, at most 3

    def push(self, token: int) -> str:
        data = self._tokenizer.decode_bytes([token])
        while 0 <= self._lead < 3 and data and data[0] & 0xC0 == 0x80:
            data, self._lead = data[1:], self._lead + 1
        if data:
            self._lead = -1
        return self._utf8.decode(data)


class Text:
    """
    Args:
        prompt: token ids, at least one.
        tokenizer: None: only ids, no text.

    Attributes:
        ids: of prompt and continuation, without a token that ended it.
        text: the continuation so far, without what may still become a stop string.
        ended: why it ended; None as long as it goes on.
        logprobs: for each new token, if asked for.
        submitted, first: clock readings (time.monotonic) of its beginning and its first token.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, tokenizer: Tokenizer | None = None) -> None:
        self.sampling, self.ids, self.num_prompt = sampling, list(prompt), len(prompt)
        self.text = ""
        self.ended: Ending | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.submitted = time.monotonic()
        self.first: float | None = None
        self._decoder = None if tokenizer is None else Decoder(tokenizer)
        self._held = ""  # decoded, but possibly the beginning of a stop string

    @property
    def made(self) -> list[int]:
        """The new ids."""
        return self.ids[self.num_prompt :]

    def push(self, token: int) -> None:
        """Append a token; it may end the text."""
        if self.first is None:
            self.first = time.monotonic()
        if token in self.sampling.stop_ids:
            self._end("stop")
            return
        self.ids.append(token)
        if self._decoder is not None:
            self._held += self._decoder.push(token)
            found = [at for stop in self.sampling.stop if (at := self._held.find(stop)) >= 0]
            if found:
                self._held = self._held[: min(found)]
                self._end("stop")
                return
            sure = len(self._held) - self._open()
            self.text += self._held[:sure]
            self._held = self._held[sure:]
        if len(self.ids) - self.num_prompt >= self.sampling.max_tokens:
            self._end("length")

    def cancel(self) -> None:
        self._end("cancelled")

    def _end(self, why: Ending) -> None:
        if self.ended is None:
            self.text += self._held
            self._held, self.ended = "", why

    def _open(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self.sampling.stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.sampling.stop):
                return length
        return 0

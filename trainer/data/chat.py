"""The answers of a chat: what the assistant wrote, found in a text and in its tokens. Imports no torch.

A message is `<|im_start|>role\\ncontent<|im_end|>\\n`. The answer of an assistant's message is what the model has to
write itself: all after the header, thoughts included, up to and with the end token, by which it stops. The header, and
the line break after the end token, come from whoever calls the model. A message without text (blanks only) is no
answer: it would teach to say nothing.

The tokens are those of the whole text, as of any other source; a token belongs to an answer if all its bytes do. Only
an answer that begins with line breaks has none at its start: the header's "\\n" and these are one token, which is not
trained. Cutting the text there would give it tokens of its own, but a server encodes the messages before the last one
as a whole, so earlier answers would have other ids in training than in use. As it is, the model goes straight from the
header to the first word, and the ids are the same whether the loss is on all tokens or on the answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from trainer.errors import DataError

if TYPE_CHECKING:  # the download step needs the text alone
    from trainer.data.tokenizer import Tokenizer

ROLE = "assistant"
MARKUP = re.compile(r"<\|(\w+)\|>")
NO_ANSWER = f"no message of the role {ROLE} with text, and 'loss: answers' trains nothing else; fix or remove the row"


class TemplateError(ValueError):
    """A conversation that a chat template does not take, in its own words."""


@dataclass(frozen=True)
class ChatFormat:
    """How a message of the assistant is written: `start` and `header`, its text, `end`.

    `start` and `end` are special tokens, which no text of a message can contain (components/download/texts.py);
    `header` may contain further ones.
    """

    start: str
    header: str
    end: str

    def has_answer(self, text: str) -> bool:
        """Whether a text has at least one answer."""
        start, header, end = map(re.escape, (self.start, self.header, self.end))
        answers = re.finditer(f"{start}{header}((?:(?!{start}|{end}).)*){end}", text, re.DOTALL)
        return any(found[1].strip() for found in answers)


CHATML = ChatFormat(start="<|im_start|>", header=f"{ROLE}\n", end="<|im_end|>")


def question(text: str) -> str:
    """A user's message in our own markup, and the header of the answer to come."""
    return f"{CHATML.start}user\n{plain(text)}{CHATML.end}\n{CHATML.start}{CHATML.header}"


def plain(text: str) -> str:
    """A text without special tokens of ours: they are broken by spaces."""
    return MARKUP.sub(r"<| \1 |>", text)


class AnswerFinder:
    """Finds the answers in the tokens of a document.

    Raises:
        DataError: start or end of a message is not one token of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat = CHATML) -> None:
        self._header = chat.header.encode()
        self._bytes = cache(lambda token: tokenizer.decode_bytes([token]))
        self._start, self._end = (_single(tokenizer, token) for token in (chat.start, chat.end))

    def __call__(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Token ranges [start, stop) of the answers, in order; they neither touch nor overlap."""
        opened, closed = marks = (self._start, self._end)
        places = [place for place, token in enumerate(ids) if token in marks]
        messages = [(a, b) for a, b in pairwise(places) if ids[a] == opened and ids[b] == closed]
        return [found for start, end in messages if (found := self._answer(ids, start, end))]

    def _answer(self, ids: Sequence[int], start: int, end: int) -> tuple[int, int] | None:
        """The answer of the message between its start token and its end token, if it is the assistant's."""
        first, head = start + 1, b""
        while len(head) < len(self._header) and first < end:
            head += self._bytes(ids[first])
            first += 1
        if not head.startswith(self._header):
            return None
        rest = head[len(self._header) :]
        for some in (ids[first : min(first + 8, end)], ids[first:end]):  # a few tokens are mostly enough
            if (rest + b"".join(map(self._bytes, some))).decode("utf-8", "ignore").strip():
                return first, end + 1
        return None


def _single(tokenizer: Tokenizer, token: str) -> int:
    if (found := tokenizer.markup.get(token)) is None:
        raise DataError(
            f"the tokenizer has no token {token}, by which 'loss: answers' finds the answers of a chat; use another "
            "tokenizer, or set loss: all"
        )
    return found

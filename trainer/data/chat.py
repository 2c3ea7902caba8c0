"""The answers of a chat: what the assistant wrote, found in a text and in its tokens. Imports no torch.

A message is `<|im_start|>role\\ncontent<|im_end|>\\n`. The answer in an assistant's message is what the model must
write itself: everything after the header, thoughts included, up to and including the end token, which stops generation.
The header, and the line break after the end token, come from the caller of the model. A message with only whitespace is
not an answer: it would teach the model to say nothing.

The whole text is tokenised at once, as for any other source; a token belongs to an answer if all its bytes do. So line
breaks at the start of an answer are not trained: together with the header's "\\n" they form one token. Splitting the
text there would give them their own tokens. But a server encodes all earlier messages as one text, so earlier answers
would have different ids in training than in use. Without the split, the model goes straight from the header to the
first word, and the ids are the same whether the loss is on all tokens or on the answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from trainer.errors import DataError

if TYPE_CHECKING:  # the download step needs only the functions for text
    from trainer.data.tokenizer import Tokenizer

ROLE = "assistant"
MARKUP = re.compile(r"<\|(\w+)\|>")
NO_ANSWER = f"no message of the role {ROLE} with text, and 'loss: answers' trains nothing else; fix or remove the row"


class TemplateError(ValueError):
    """A chat template rejects a conversation; the message is the template's own."""


@dataclass(frozen=True)
class ChatFormat:
    """How a message of the assistant is written: `start` and `header`, its text, `end`.

    `start` and `end` are special tokens, which the text of a message never contains (components/download/texts.py);
    `header` may contain other special tokens.
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
    """A user's message in our own markup, followed by the header of the answer."""
    return f"{CHATML.start}user\n{plain(text)}{CHATML.end}\n{CHATML.start}{CHATML.header}"


def conversation(messages: Sequence[dict[str, str]]) -> str:
    """Messages in our own markup, as the chat template of an export writes them, followed by the header of the
    answer."""
    written = []
    for message in messages:
        content = plain(message["content"])
        if message["role"] == ROLE:
            content = content.replace("<think>", "<|think_start|>").replace("</think>", "<|think_end|>")
        written.append(f"{CHATML.start}{plain(message['role'])}\n{content}{CHATML.end}\n")
    return f"{''.join(written)}{CHATML.start}{CHATML.header}"


def plain(text: str) -> str:
    """The text with spaces inserted into our special tokens, so that it contains none."""
    return MARKUP.sub(r"<| \1 |>", text)


class AnswerFinder:
    """Finds the answers in the tokens of a document.

    Raises:
        DataError: the tokenizer has no single token for the start or the end of a message.
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
        """The answer in the message between a start token and an end token, if it is the assistant's."""
        first, head = start + 1, b""
        while len(head) < len(self._header) and first < end:
            head += self._bytes(ids[first])
            first += 1
        if not head.startswith(self._header):
            return None
        rest = head[len(self._header) :]
        for some in (ids[first : min(first + 8, end)], ids[first:end]):  # the first few tokens are usually enough
            if (rest + b"".join(map(self._bytes, some))).decode("utf-8", "ignore").strip():
                return first, end + 1
        return None


def _single(tokenizer: Tokenizer, token: str) -> int:
    if (found := tokenizer.markup.get(token)) is None:
        raise DataError(
            f"the tokenizer has no token {token}, which 'loss: answers' needs to find the answers of a chat; use "
            "another tokenizer, or set loss: all"
        )
    return found

"""What requests get: OpenAI's objects, whole or as a stream of server-sent events.

Texts that come in pieces are collected by `Answer`; both forms are written from the same pieces, so a stream says what
the whole answer would.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.data.tokenizer import Tokenizer
from trainer.inference.text import TokenLogprobs
from trainer.serving.engine_thread import Piece

DONE = b"data: [DONE]\n\n"
Logprobs = Sequence[tuple[int, TokenLogprobs]]


def encoded(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: object) -> bytes:
    return b"data: " + encoded(value) + b"\n\n"


def joined(pieces: Sequence[Piece]) -> dict[int, Piece]:
    """The pieces of each text as one."""
    found: dict[int, Piece] = {}
    for piece in pieces:
        before = found.get(piece.index)
        if before is not None:
            logprobs = [*before.logprobs, *piece.logprobs]
            tokens = before.tokens + piece.tokens
            piece = Piece(piece.index, before.text + piece.text, logprobs, tokens, piece.ended)
        found[piece.index] = piece
    return found


class Answer:
    """The answer to a completion.

    Args:
        prompts: tokens of all prompts, each counted once.
        logprobs: whether they were asked for.
        usage: whether a stream ends with it.
    """

    PREFIX, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, prompts: int, logprobs: bool, usage: bool = False) -> None:
        self._head = {"id": f"{self.PREFIX}-{secrets.token_hex(16)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._prompts, self._logprobs, self._with_usage = tokenizer, prompts, logprobs, usage
        self._tokens = 0

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer, given all pieces of all texts."""
        choices = []
        for index, piece in sorted(joined(pieces).items()):
            self._tokens += piece.tokens
            choices.append(self._choice(index, self._said(piece), piece))
        return {**self._head, "object": self.WHOLE, "choices": choices, "usage": self._usage()}

    def begin(self, texts: int) -> Iterator[bytes]:
        """The first events of a stream."""
        yield from ()

    def events(self, pieces: Sequence[Piece]) -> Iterator[bytes]:
        """The events of a stream for new pieces."""
        for index, piece in joined(pieces).items():
            self._tokens += piece.tokens
            if piece.text or piece.logprobs or piece.ended:
                yield self._chunk([self._choice(index, self._part(piece), piece)])

    def end(self) -> Iterator[bytes]:
        """The last events of a stream."""
        if self._with_usage:
            yield event({**self._head, "object": self.CHUNK, "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": None} if self._with_usage else {}
        return event({**self._head, "object": self.CHUNK, "choices": choices, **usage})

    def _choice(self, index: int, content: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = self._written(piece.logprobs) if self._logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": piece.ended}

    def _usage(self) -> dict[str, int]:
        total = self._prompts + self._tokens
        return {"prompt_tokens": self._prompts, "completion_tokens": self._tokens, "total_tokens": total}

    def _said(self, piece: Piece) -> dict[str, Any]:
        """The field of a choice with its text."""
        return {"text": piece.text}

    _part = _said

    def _written(self, logprobs: Logprobs) -> dict[str, Any]:
        return {
            "tokens": [self._named(found.token) for _, found in logprobs],
            "token_logprobs": [found.logprob for _, found in logprobs],
            "top_logprobs": [{self._named(token): value for token, value in found.top} for _, found in logprobs],
            "text_offset": [place for place, _ in logprobs],
        }

    def _named(self, token: int) -> str:
        """The text of a token; bytes that are none as OpenAI writes them, so that different tokens differ."""
        data = self._tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatAnswer(Answer):
    """The answer to a chat."""

    PREFIX, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, texts: int) -> Iterator[bytes]:
        for index in range(texts):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _said(self, piece: Piece) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}

    def _part(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text} if piece.text else {}}

    def _written(self, logprobs: Logprobs) -> dict[str, Any]:
        content = [
            {
                **self._token(found.token, found.logprob),
                "top_logprobs": [self._token(token, value) for token, value in found.top],
            }
            for _, found in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.decode_bytes([token])
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

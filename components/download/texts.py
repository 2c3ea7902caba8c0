"""From a row to a text: one column, a template over several, or a chat in the tokenizer's markup."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

from manifests.dataspec import CHAT, SourceSpec, TextSpec, template_fields
from trainer.data.chat import CHATML, NO_ANSWER, ROLE
from trainer.errors import DataError

START, END = CHATML.start, f"{CHATML.end}\n"
THINKING = {"<think>": "<|think_start|>", "</think>": "<|think_end|>"}
THINK = re.compile("(</?think>)")
TEXT_PARTS = ("text", "input_text", "output_text")
MARKUP = re.compile(r"<\|(\w+)\|>")

Row = list[Any]  # the values of `TextSpec.columns`, in order


def maker(spec: TextSpec) -> Callable[[str, Row], str]:
    """A function of (where, row) that returns the row's text, "" if it has none.

    It raises DataError if a value is not text, not a list of messages where the template says chat, or without an
    answer where the loss is on answers only.
    """
    if spec.template is None:
        return lambda where, row: _string(where, spec.columns[0], row[0])
    fields, columns = template_fields(spec.template), spec.columns
    needs_answer = isinstance(spec, SourceSpec) and spec.loss == "answers"

    def rendered(where: str, row: Row) -> str:
        pieces, filled = list[tuple[str, bool]](), False
        for literal, name, form in fields:
            pieces.append((literal, True))
            if name is not None:
                value = row[columns.index(name)]
                some = chat(where, name, value) if form == CHAT else [(_string(where, name, value), False)]
                filled = filled or any(text.strip() for text, _ in some)
                pieces += some
        if not filled:
            return ""
        text = joined(pieces) if spec.has_markup else "".join(text for text, _ in pieces)
        if needs_answer and not CHATML.has_answer(text):
            raise DataError(f"{where}: {NO_ANSWER}")
        return text

    return rendered


def joined(pieces: Iterable[tuple[str, bool]]) -> str:
    """Join pieces (text, markup); special tokens stay special only inside one piece with markup True.

    So neither one piece nor two adjacent ones can imitate the markup around them.
    """
    text, bounds = "", list[tuple[int, int]]()
    for piece, is_markup in pieces:
        if is_markup and bounds and bounds[-1][1] == len(text):
            bounds[-1] = (bounds[-1][0], len(text) + len(piece))
        elif is_markup:
            bounds.append((len(text), len(text) + len(piece)))
        text += piece
    starts = [start for start, _ in bounds]

    def broken(found: re.Match[str]) -> str:
        at = bisect_right(starts, found.start()) - 1
        inside = at >= 0 and found.end() <= bounds[at][1]
        return found[0] if inside else f"<| {found[1]} |>"

    return MARKUP.sub(broken, text)


def chat(where: str, column: str, messages: Any) -> list[tuple[str, bool]]:
    """A conversation as pieces for `joined`; an assistant's `<think>` becomes the tokenizer's token too."""
    if messages is None:
        return []
    if not isinstance(messages, list):
        raise DataError(f"{where}: column '{column}' holds a {type(messages).__name__}; {{…:chat}} needs messages")
    pieces = list[tuple[str, bool]]()
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        text = _content(where, column, content)
        if not isinstance(role, str) or text is None:
            raise DataError(f"{where}: column '{column}' holds a message without a role or with no text as its content")
        if "\n" in role:
            raise DataError(f"{where}: column '{column}' holds a role with a line break; fix or remove the row")
        pieces += [(START, True), (role, False), ("\n", True)]
        if role == ROLE:
            pieces += [(THINKING.get(part, part), part in THINKING) for part in THINK.split(text)]
        else:
            pieces.append((text, False))
        pieces.append((END, True))
    return pieces


def _content(where: str, column: str, content: Any) -> str | None:
    """The text of a message, which may have parts as in OpenAI's API; None if it is not text."""
    if not isinstance(content, list):
        return content or "" if isinstance(content, str | None) else None
    texts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind is not None and not (kind in TEXT_PARTS and isinstance(text, str)):
            raise DataError(
                f"{where}: column '{column}' holds a message with a part of type '{kind}'; only text is read"
            )
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _string(where: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: column '{column}' holds a {type(value).__name__}; give a column of strings")
    return value


def unicode_text(text: str) -> str:
    """The text with lone surrogates, possible in JSON escapes but not in UTF-8, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

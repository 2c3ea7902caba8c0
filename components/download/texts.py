"""From a row to a text: one column, a template over several, or a chat in the tokenizer's markup."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from manifests.dataspec import CHAT, TextSpec, template_fields
from trainer.data.manifest import DataError

MESSAGE = "<|im_start|>{role}\n{content}<|im_end|>\n"
THINKING = {"<think>": "<|think_start|>", "</think>": "<|think_end|>"}
MARKUP = re.compile(r"<\|(\w+)\|>")

Row = list[Any]  # the values of `TextSpec.columns`, in that order


def maker(spec: TextSpec) -> Callable[[str, Row], str]:
    """A function of (where, row) that gives the row's text, "" for one without.

    Its errors are DataErrors: a value that is no text, or no list of messages where the template says chat.
    """
    if spec.template is None:
        return lambda where, row: _string(where, spec.columns[0], row[0])
    fields, columns = template_fields(spec.template), spec.columns

    def rendered(where: str, row: Row) -> str:
        pieces, filled = [], False
        for literal, name, form in fields:
            pieces.append(literal)
            if name is not None:
                value = row[columns.index(name)]
                text = chat(where, name, value) if form == CHAT else _string(where, name, value)
                filled = filled or bool(text.strip())
                pieces.append(unmarked(text) if spec.has_markup and form != CHAT else text)
        return "".join(pieces) if filled else ""

    return rendered


def chat(where: str, column: str, messages: Any) -> str:
    """A conversation with the tokenizer's special tokens; `<think>` of an assistant becomes its token too.

    Special tokens that somebody wrote in a message are broken up, so that no message can pass for another.
    """
    if messages is None:
        return ""
    if not isinstance(messages, list):
        raise DataError(f"{where}: column '{column}' holds a {type(messages).__name__}; {{…:chat}} needs messages")
    turns = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise DataError(f"{where}: column '{column}' holds a message without a role or with no text as its content")
        body = unmarked(content or "")
        if role == "assistant":
            for tag, token in THINKING.items():
                body = body.replace(tag, token)
        turns.append(MESSAGE.format(role=unmarked(role), content=body))
    return "".join(turns)


def unmarked(text: str) -> str:
    """The text without anything that the tokenizer would take for a special token."""
    return MARKUP.sub(r"<| \1 |>", text)


def _string(where: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: column '{column}' holds a {type(value).__name__}; give a column of strings")
    return value


def unicode_text(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON escapes can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

"""From a row to a text: one column, a template over several, or a chat in the tokenizer's markup."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from manifests.dataspec import CHAT, SourceSpec, TextSpec, template_fields
from trainer.data.chat import CHATML, MARKUP, NO_ANSWER, ROLE, TemplateError
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.data.chattemplate import ChatTemplate

START, END = CHATML.start, f"{CHATML.end}\n"
THINKING = {"<think>": "<|think_start|>", "</think>": "<|think_end|>"}
THINK = re.compile("(</?think>)")
TEXT_PARTS = ("text", "input_text", "output_text")

Row = list[Any]  # the values of `TextSpec.columns`, in order


def maker(spec: TextSpec, template: ChatTemplate | None = None) -> Callable[[str, Row], str]:
    """A function of (where, row) that returns the row's text, "" if it has none.

    It raises DataError if a value is not text, if a value is not a list of messages where the template says chat, if
    the chat template rejects a conversation, or if there is no answer although the loss is on answers only.

    Args:
        template: the chat template of another model's tokenizer, which writes conversations; None for our own markup.
    """
    if spec.template is None:
        return lambda where, row: _string(where, spec.columns[0], row[0])
    fields, columns = template_fields(spec.template), spec.columns
    needs_answer = isinstance(spec, SourceSpec) and spec.loss == "answers"
    form_of_answers = template.form if template else CHATML
    marked_up = spec.has_markup and template is not None

    def pieces_of(where: str, column: str, value: Any, form: str) -> list[tuple[str, bool]]:
        if form == CHAT:
            messages = messages_of(where, column, value)
            return _by_template(where, template, messages) if template else own_markup(messages)
        text = _string(where, column, value)
        return [(template.plain(text), True)] if template and marked_up else [(text, False)]

    def rendered(where: str, row: Row) -> str:
        pieces, filled = list[tuple[str, bool]](), False
        for literal, name, form in fields:
            pieces.append((literal, True))
            if name is not None:
                some = pieces_of(where, name, row[columns.index(name)], form)
                filled = filled or any(text.strip() for text, _ in some)
                pieces += some
        if not filled:
            return ""
        text = joined(pieces) if spec.has_markup else "".join(text for text, _ in pieces)
        if needs_answer and not form_of_answers.has_answer(text):
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


def messages_of(where: str, column: str, value: Any) -> list[tuple[str, str]]:
    """Role and text of each message of a conversation."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{where}: column '{column}' holds a {type(value).__name__}; {{…:chat}} needs messages")
    found = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        text = _content(where, column, content)
        if not isinstance(role, str) or text is None:
            raise DataError(f"{where}: column '{column}' holds a message without a role or with no text as its content")
        if "\n" in role:
            raise DataError(f"{where}: column '{column}' holds a role with a line break; fix or remove the row")
        found.append((role, text))
    return found


def own_markup(messages: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """A conversation as pieces for `joined`; an assistant's `<think>` becomes the tokenizer's token for it."""
    pieces = list[tuple[str, bool]]()
    for role, text in messages:
        pieces += [(START, True), (role, False), ("\n", True)]
        if role == ROLE:
            pieces += [(THINKING.get(part, part), part in THINKING) for part in THINK.split(text)]
        else:
            pieces.append((text, False))
        pieces.append((END, True))
    return pieces


def _by_template(where: str, template: ChatTemplate, messages: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    try:
        text = template.render([{"role": role, "content": text} for role, text in messages]) if messages else ""
    except TemplateError as error:
        raise DataError(
            f"{where}: the model's chat template rejects this conversation ({error}); fix or remove the row"
        ) from None
    return [(text, True)]


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

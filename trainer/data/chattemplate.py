"""The chat template of another model's tokenizer, which writes its conversations. Imports no torch.

A template is a Jinja program by the author of the model, so it runs in Jinja's sandbox. It has the functions that
transformers gives to such templates except the date, which would change the data from one day to the next.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from trainer.data.chat import CHATML, ROLE, ChatFormat, TemplateError, conversation, question
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.files import read_object, unreadable

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
# Exceptions that a template may raise, besides Jinja's own.
_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
_QUESTION, _ANSWER = "Is it so?", "It is."  # to find out how a template writes an answer


class ChatTemplate:
    """
    Args:
        folder: the tokenizer's folder.
        tokenizer: that tokenizer, already loaded.

    Attributes:
        digest: sha256 of the template.
        form: the tokens before and after an answer.

    Raises:
        DataError: there is no template, or answers cannot be found in its output.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._tokenizer, self._folder = tokenizer or Tokenizer.load(folder), Path(folder)
        extensions = [loopcontrols, _generation()]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _json
        environment.globals["raise_exception"] = _refuse
        config = read_object(self._folder / CONFIG)
        source = _source(self._folder, config)
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"{folder}: its chat template is not valid Jinja ({error}); repair or replace it") from None
        tokens = {name: value for name, value in config.items() if name.endswith("_token") and value}  # null: undefined
        self._tokens = {name: v.get("content") if isinstance(v, dict) else v for name, v in tokens.items()}
        specials = sorted(self._tokenizer.markup, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self.form = self._form()

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as the template writes it. A space is inserted into special tokens in roles and contents, so
        that they cannot imitate the template's own.

        Raises:
            TemplateError: the template rejects it.
        """
        return self._rendered([{name: self.plain(text) for name, text in message.items()} for message in messages])

    def question(self, text: str) -> str:
        """A user's message, followed by the start of the answer (the generation prompt)."""
        return self.asked([{"role": "user", "content": text}])

    def asked(self, messages: Sequence[dict[str, str]]) -> str:
        """As `render`, followed by the start of the answer (the generation prompt)."""
        plain = [{name: self.plain(text) for name, text in message.items()} for message in messages]
        return self._rendered(plain, to_answer=True)

    def plain(self, text: str) -> str:
        """The text with a space inserted into each special token."""
        return self._special.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)

    def _rendered(self, messages: list[dict[str, str]], *, to_answer: bool = False) -> str:
        from jinja2 import TemplateError as JinjaError

        try:
            return self._template.render(messages=messages, add_generation_prompt=to_answer, **self._tokens)
        except (JinjaError, *_FAULTS) as error:
            raise TemplateError(" ".join(str(error).split()) or type(error).__name__) from None

    def _form(self) -> ChatFormat:
        """Find what the template writes before and after an answer, by rendering one question and one answer.

        Thoughts that a template opens itself (<think>) belong to the answer, because not every answer has them.
        """
        asked = [{"role": "user", "content": _QUESTION}]
        try:
            before, prompt = self._rendered(asked), self._rendered(asked, to_answer=True)
            whole = self._rendered([*asked, {"role": ROLE, "content": _ANSWER}])
        except TemplateError as error:
            raise DataError(f"{self._folder}: its chat template fails on a question and an answer ({error})") from None
        same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
        head, tail = "".join(a for a, _ in same).removeprefix(before), whole.rpartition(_ANSWER)[2]
        if thoughts := self._tokenizer.added - self._tokenizer.markup.keys():
            head = re.split("|".join(map(re.escape, thoughts)), head)[0]
        first, last = self._special.match(head), self._special.match(tail.lstrip())
        if not (prompt.startswith(before) and first and head[first.end() :].strip() and last):
            raise DataError(
                f"{self._folder}: its chat template does not mark start and end of an answer by special tokens, which "
                "are needed to find answers; replace the template"
            )
        return ChatFormat(first[0], head[first.end() :], last[0])


def chat_template(folder: str | Path, tokenizer: Tokenizer | None = None) -> ChatTemplate | None:
    """The chat template of a tokenizer; None for one that was trained here, whose markup is our own.

    Raises:
        DataError: as ChatTemplate.
    """
    tokenizer = tokenizer or Tokenizer.load(folder)
    return None if tokenizer.is_own else ChatTemplate(folder, tokenizer)


def has_template(folder: Path) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return (folder / FILE).is_file() or "chat_template" in read_object(folder / CONFIG)


class Asking:
    """Writes questions for a model that was trained on chats: a text as a user's message, ready to be answered.

    Args:
        folder: the tokenizer's folder.

    Attributes:
        stops: the ids at which an answer ends.

    Raises:
        DataError: as ChatTemplate.
    """

    def __init__(self, folder: str | Path) -> None:
        self._tokenizer = Tokenizer.load(folder)
        self._template = chat_template(folder, self._tokenizer)
        form = self._template.form if self._template else CHATML
        self.stops = {self._tokenizer.eod_id, *self._tokenizer.encode(form.end, specials=True)}

    def __call__(self, text: str) -> list[int]:
        """The ids of the question, up to the start of the answer."""
        asked = self._template.question(text) if self._template else question(text)
        return self._tokenizer.begun(self._tokenizer.encode(asked, specials=True))

    def text(self, messages: Sequence[dict[str, str]], *, whole: bool = False) -> str:
        """A conversation up to the start of the next answer.

        Args:
            whole: with every message. Otherwise a template that has no place for a system message gets none.

        Raises:
            DataError: the template rejects the conversation.
        """
        if self._template is None:
            return conversation(messages)
        without = [message for message in messages if message["role"] != "system"]
        for tried in (messages,) if whole else (messages, without):
            try:
                return self._template.asked(tried)
            except TemplateError as error:
                said = error
        raise DataError(f"the chat template rejects a conversation ({said}); repair the template, or set chat: false")

    def ids(self, messages: Sequence[dict[str, str]], *, whole: bool = False) -> list[int]:
        """The ids of `text`."""
        return self._tokenizer.begun(self._tokenizer.encode(self.text(messages, whole=whole), specials=True))


def form_of(folder: str | Path, tokenizer: Tokenizer | None = None) -> ChatFormat:
    """The tokens before and after an answer of a chat. Arguments and errors are those of `chat_template`."""
    template = chat_template(folder, tokenizer)
    return template.form if template else CHATML


def _generation() -> type:
    """The extension for {% generation %}, by which transformers marks the tokens to train; it does not change the text.

    Answers are found without it here, because most templates do not have it.
    """
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, with the arguments that it has in transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _source(folder: Path, config: dict[str, Any]) -> str:
    if (folder / FILE).is_file():
        try:
            return (folder / FILE).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{folder / FILE}: is not UTF-8; repair or replace it") from None
        except OSError as error:
            raise unreadable(folder / FILE, error) from None
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise DataError(f"{folder}: has no chat template ({FILE}, or chat_template in {CONFIG}); add one")
    return found


def _refuse(message: str) -> None:
    raise TemplateError(message)

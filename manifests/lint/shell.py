"""The simple commands of a shell script, as far as a linter needs them: no expansion, no control flow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

_HEREDOC = re.compile(r"<<-?[ \t]*(['\"]?)(\w+)\1([^\n]*)\n.*?(?:^[ \t]*\2[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_KEYWORDS = frozenset(["if", "then", "elif", "else", "do", "while", "until", "!", "{", "time"])
LOOPS = frozenset(("for", "while", "until", "select"))
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)


@dataclass
class Command:
    """One simple command.

    Attributes:
        words: without quotes, redirections and assignments; `$NAME` and `$(…)` are left as they are.
        assignments: `NAME=value` before it, or alone.
        in_background: followed by &.
        in_loop: after a for, while or until.
    """

    words: list[str] = field(default_factory=list)
    assignments: dict[str, str] = field(default_factory=dict)
    in_background: bool = False
    in_loop: bool = False


def commands(script: str) -> list[Command]:
    """All simple commands in order, including those of pipes, lists and groups."""
    found: list[Command] = []
    current, in_loop = Command(), False
    tokens = _tokens(_HEREDOC.sub(r"\3\n", script.replace("\\\n", " ")))
    for word, is_operator in chain(tokens, [("\n", True)]):
        if is_operator:
            current.in_background = word == "&"
            if current.words or current.assignments:
                found.append(current)
            current = Command(in_loop=in_loop)
            continue
        if not current.words and (assigned := _ASSIGNMENT.fullmatch(word)):
            current.assignments[assigned[1]] = assigned[2]
            continue
        if not current.words and word in LOOPS:
            in_loop = current.in_loop = True
        if current.words or word not in _KEYWORDS:
            current.words.append(word)
        if current.words == ["done"]:
            in_loop = False
    return found


def _tokens(script: str) -> Iterator[tuple[str, bool]]:
    """Yield words and operators, and whether each is an operator."""
    word: list[str] | None = None
    skip_word = False  # the target of a redirection
    at, text = 0, script + "\n"
    while at < len(text):
        sign, end = text[at], at + 1
        if sign in " \t\n;&|()<>":
            if word is not None:
                joined = "".join(word)
                if sign in "<>" and joined.isdigit():  # 2>
                    pass
                elif skip_word:
                    skip_word = False
                else:
                    yield joined, False
                word = None
            if sign in "<>" or text.startswith("&>", at):
                end = at + len(re.match(r"[<>&|]+", text[at:])[0])  # type: ignore[index]
                skip_word = True
                if (number := re.match(r"\d+|-", text[end:])) and text[end - 1] == "&":
                    end, skip_word = end + len(number[0]), False
            elif sign in "\n;&|()":
                end = at + (2 if text[at : at + 2] in ("&&", "||", ";;") else 1)
                yield text[at:end], True
                skip_word = False
        elif sign == "#" and word is None:
            end = text.index("\n", at)
        else:
            word = [] if word is None else word
            if sign == "'":
                end = _after(text, "'", at + 1)
                word.append(text[at + 1 : end - 1])
            elif sign == '"':
                end = _double_quoted_end(text, at + 1)
                word.append(re.sub(r'\\(["\\$`\n])', r"\1", text[at + 1 : end - 1]))
            elif sign == "\\":
                end = at + 2
                word.append(text[at + 1 : end])
            elif text.startswith(("$(", "${"), at):
                end = _closing(text, at + 1)
                word.append(text[at:end])
            elif sign == "`":
                end = _after(text, "`", at + 1)
                word.append(text[at:end])
            else:
                word.append(sign)
        at = end
    if word is not None:  # an open quote
        yield "".join(word), False


def _after(text: str, sign: str, start: int) -> int:
    found = text.find(sign, start)
    return len(text) if found < 0 else found + 1


def _double_quoted_end(text: str, start: int) -> int:
    at = start
    while at < len(text) and text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return min(at + 1, len(text))


def _closing(text: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    opening = text[start]
    closing = {"(": ")", "{": "}"}[opening]
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == opening) - (text[at] == closing)
        if depth == 0:
            return at + 1
    return len(text)

"""Documents from byte ranges of JSON-lines files. A range owns the lines that start in it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import DataError


def documents(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, str]]:
    """Yield (byte offset of the line, its "text") for the lines that start in bytes [start, stop) of the file.

    Raises:
        DataError, OSError: as `objects`.
    """
    return ((at, found["text"]) for at, found in objects(path, start, stop))


def objects(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (byte offset of the line, its object) for the lines that start in bytes [start, stop) of the file.

    Raises:
        DataError: a line is not a JSON object with a string "text"; names file and line.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that started before; empty if a line starts exactly at `start`
        at = file.tell()
        while (stop is None or at < stop) and (line := file.readline()):
            try:
                found = json.loads(line)
                text = found["text"]
                if not isinstance(text, str):
                    raise TypeError
                text.encode()  # JSON can contain lone surrogates, which are not valid Unicode text
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{where(path, at)}: {_problem(error)}; fix or remove the line") from None
            yield at, found
            at += len(line)


def where(path: str | Path, offset: int) -> str:
    """`path:line` of the line that starts at a byte offset; reads the file up to there."""
    line = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(offset, 2**20))):
            line += block.count(b"\n")
            offset -= len(block)
    return f"{path}:{line}"


def _problem(error: Exception) -> str:
    if isinstance(error, KeyError):
        return 'no field "text"'
    if isinstance(error, UnicodeError):
        return "not valid UTF-8"
    if isinstance(error, ValueError):
        return "not valid JSON"
    return 'not a JSON object whose "text" is a string'

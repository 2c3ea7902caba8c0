"""Read rows from JSON lines, with messages for files that are nearly that."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from components.download.streams import BOM, not_utf8
from trainer.errors import DataError

LONGEST_LINE = 2**30
AHEAD = 100  # rows read to tell whether one row or the whole file lacks a column
EACH = "each line must be one JSON object"


def json_rows(blocks: Iterator[bytes], name: str, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield (location, values of `columns`) of each object.

    Raises:
        DataError: a line is not a JSON object or lacks a column.
    """
    quoted = [json.dumps(column, ensure_ascii=False).encode() for column in columns]
    numbered = ((n, line) for n, line in enumerate(lines(blocks, name), start=1) if line.strip())
    first = True
    for number, line in numbered:
        where = f"{name}:{number}"
        row = _object(where, line, first)
        if any(line.count(column) > 1 for column in quoted):
            _check_twice(where, line, columns)
        try:
            values = [row[column] for column in columns]
        except KeyError as error:
            column = error.args[0]
            if not first or _any_has(column, islice(numbered, AHEAD)):
                raise DataError(
                    f"{where}: no column '{column}', which other rows have; this one has {listed(row)}; fix or remove "
                    "the row"
                ) from None
            raise no_column(where, column, row) from None
        first = False
        yield where, values


def lines(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Lines without their line ends: LF, or CR if the first block has no LF.

    Raises:
        DataError: a line is longer than LONGEST_LINE.
    """
    first = next(blocks, b"")
    end = b"\r" if b"\r" in first[:-1] and b"\n" not in first else b"\n"
    begun, size = list[bytes](), 0
    for block in chain([first], blocks):
        head, *others = block.split(end)
        begun.append(head)
        size += len(head)
        if size > LONGEST_LINE:
            raise DataError(f"{name}: a line of more than {LONGEST_LINE >> 30} GiB; {EACH}")
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun, size = [others[-1]], len(others[-1])
    if size:
        yield b"".join(begun)


def check_nul(where: str, line: bytes) -> None:
    """Refuse NUL bytes, which a file system leaves after a crash in place of unwritten data."""
    if b"\0" in line and not line.strip(b"\0 \t\r"):
        raise DataError(f"{where}: a line of NUL bytes; fetch the file again")


def _object(where: str, line: bytes, first: bool) -> dict[str, Any]:
    check_nul(where, line)
    try:
        text = line.removeprefix(BOM).decode()  # files that each begin with a BOM may have been concatenated
    except UnicodeDecodeError as error:
        raise not_utf8(where, line, error.start) from None
    try:
        row = None if first and text.lstrip().startswith("[") else _parsed(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({_problem(text, error, first)}); {EACH}") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; remove the line") from None
    if isinstance(row, dict):
        return row
    if first and text.lstrip().startswith("["):
        raise DataError(f"{where}: a list; {EACH}, as jq -c '.[]' writes them")
    raise DataError(f"{where}: a {type(row).__name__}; {EACH}")


def _parsed(text: str, **how: Any) -> Any:
    try:
        return json.loads(text, **how)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses integers of thousands of digits; nobody uses one as a text
        return json.loads(text, parse_int=float, **how)


def _problem(text: str, error: json.JSONDecodeError, first: bool) -> str:
    if "\0" in text:
        return "NUL bytes in it; fetch the file again"
    in_a_string = error.msg.startswith("Unterminated string")  # a place where no tool breaks a line
    if in_a_string or error.pos >= len(text.rstrip()):
        several = first and not in_a_string
        return "an object over several lines, jq -c . writes it on one" if several else "the line ends too early"
    return f"{error.msg} at character {error.pos + 1}"


def _check_twice(where: str, line: bytes, columns: Sequence[str]) -> None:
    """Refuse an object that has a column twice with different values."""
    pairs = _parsed(line.removeprefix(BOM).decode(), object_pairs_hook=list)
    for column in columns:
        values = [value for key, value in pairs if key == column]
        if any(value != values[0] for value in values):
            raise twice(where, column, len(values))


def _any_has(column: str, numbered: Iterator[tuple[int, bytes]]) -> bool:
    for _, line in numbered:
        try:
            if column in json.loads(line):
                return True
        except (ValueError, TypeError, RecursionError):
            return False
    return False


def twice(where: str, column: str, count: int) -> DataError:
    times = "twice" if count == 2 else f"{count} times"
    return DataError(
        f"{where}: has the column '{column}' {times}; keep one of them, or set text_column to one that occurs once"
    )


def no_column(where: str, column: str, columns: Iterable[str]) -> DataError:
    return DataError(f"{where}: no column '{column}'; columns are {listed(columns)}; set text_column to one of them")


def listed(columns: Iterable[str]) -> str:
    """The first names, each on one line and shortened."""
    names = [" ".join(column.split())[:40] for column in columns]
    return (", ".join(names[:20]) or "none") + (", …" if len(names) > 20 else "")

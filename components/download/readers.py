"""Read rows from one file: JSON lines, a table or plain text, by suffix; all but Parquet also compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.download.jsonlines import json_rows, no_column
from components.download.streams import COMPRESSIONS, blocks, not_utf8
from components.download.tables import DELIMITERS, csv_rows, parquet_rows
from trainer.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
KNOWN = (
    ".jsonl, .ndjson, .json (one object a line), .csv, .tsv (the first line names the columns), .txt (each file is one "
    f"document; all these also with {', '.join(COMPRESSIONS)}), .parquet"
)


def split_suffix(name: str) -> tuple[str, str]:
    """(format suffix, compression suffix or "") of a file name.

    Raises:
        DataError: the suffix is not one of a known format.
    """
    path = Path((name.split("?")[0] if name.startswith(("http://", "https://")) else name).lower())
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    form = Path(path.name.removesuffix(compression)).suffix
    if form not in (*JSON_LINES, *DELIMITERS, ".txt", ".parquet") or (form == ".parquet" and compression):
        raise DataError(f"{name}: its suffix is not a known format; name the file one of {KNOWN}")
    return form, compression


def rows(path: Path, name: str, columns: list[str], advance: Callable[[int], None]) -> Iterator[tuple[str, list[Any]]]:
    """Yield (location, values of `columns`) of each row of a file, in order.

    A plain text file is one row with the column "text". `name` is used in messages; `advance`
    receives the number of bytes read.

    Raises:
        DataError: the file is damaged, does not match its suffix, or lacks a column.
        OSError: the file cannot be read.
    """
    form, compression = split_suffix(name)
    if form == ".parquet":
        return parquet_rows(path, name, columns, advance)
    content = blocks(path, name, form, compression, advance)
    if form == ".txt":
        return _plain(content, name, columns)
    return csv_rows(content, name, form, columns) if form in DELIMITERS else json_rows(content, name, columns)


def _plain(content: Iterator[bytes], name: str, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    data = b"".join(content)
    try:
        row = {"text": data.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise not_utf8(name, data, error.start) from None
    if missing := [column for column in columns if column not in row]:
        raise no_column(name, missing[0], list(row))
    yield name, [row[column] for column in columns]

"""Read rows from tables: CSV and TSV, whose first line names the columns, and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.download.jsonlines import check_nul, lines, listed, no_column, twice
from components.download.streams import BLOCK_BYTES, HEAD_BYTES, check_head, not_utf8
from trainer.errors import DataError, first_line

LONGEST_FIELD = 2**28  # bytes; an unclosed quote would make one field of the rest of a file
BATCH_ROWS = 512
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def csv_rows(blocks: Iterator[bytes], name: str, form: str, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield (location, values of `columns`) of each row after the header, by RFC 4180.

    Raises:
        DataError: the header lacks a column, a row has another length, a quote is not closed.
    """
    csv.field_size_limit(LONGEST_FIELD)
    delimiter, at = DELIMITERS[form], 1
    reader = csv.reader(_decoded(blocks, name), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    chosen: list[int] = []
    try:
        for row in reader:
            where, at = f"{name}:{at}", reader.line_num + 1
            if not row:
                continue
            if header is None:
                header = [field.strip() for field in row]
                chosen = [_position(where, header, column, delimiter) for column in columns]
            elif len(row) != len(header):
                raise DataError(
                    f"{where}: {len(row)} fields, the header has {len(header)}; put fields with {_named(delimiter)} or "
                    "line ends in double quotes"
                )
            else:
                yield where, [row[number] for number in chosen]
    except csv.Error as error:
        raise DataError(
            f"{name}:{at}: no {form[1:].upper()} ({error}); close double quotes, and write one inside a field twice"
        ) from None


def _decoded(blocks: Iterator[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines(blocks, name), start=1):
        check_nul(f"{name}:{number}", line)
        try:
            yield line.decode() + "\n"
        except UnicodeDecodeError as error:
            raise not_utf8(f"{name}:{number}", line, error.start) from None


def _position(where: str, header: list[str], column: str, delimiter: str) -> int:
    if (count := header.count(column)) == 1:
        return header.index(column)
    if count:
        raise twice(where, column, count)
    other = next((one for one in (";", "\t", ",", "|") if one != delimiter and one in header[0]), "")
    if len(header) == 1 and other:
        raise DataError(f"{where}: fields are separated by {_named(other)}; write them with {_named(delimiter)}")
    raise DataError(
        f"{where}: no column '{column}'; the first line must name the columns and has {listed(header)}; set "
        "text_column to one of them, or write that line"
    )


def _named(delimiter: str) -> str:
    return {",": "commas", "\t": "tabs", ";": "semicolons"}.get(delimiter, f"'{delimiter}'")


def parquet_rows(
    path: Path, name: str, columns: list[str], advance: Callable[[int], None]
) -> Iterator[tuple[str, list[Any]]]:
    """Yield (location, values of `columns`) of each row; `advance` receives the approximate number of bytes read.

    Raises:
        DataError: it is not a complete Parquet file, is encrypted, or lacks a column or has it more than once.
        OSError: it cannot be read.
    """
    import pyarrow as pa  # slow to import, and only tables need it
    import pyarrow.parquet as pq

    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise DataError(f"{name}: 0 bytes, so not Parquet; fetch or make the file again")
    check_head(name, head, ".parquet")
    try:
        # Read in pieces, not in whole row groups, which can have 500 MB.
        with pq.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False, page_checksum_verification=True) as file:
            there = file.schema_arrow.names
            for column in columns:
                if there.count(column) > 1:
                    raise twice(name, column, there.count(column))
                if column not in there:
                    raise no_column(name, column, there)
            size, count, row = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                advance(size * (row + len(batch)) // count - size * row // count)
                try:
                    values_of = [batch.column(column).to_pylist() for column in columns]
                except UnicodeDecodeError:
                    rows = f"rows {row + 1} to {row + len(batch)}"
                    raise DataError(f"{name} {rows}: a text is not UTF-8; write the file again in UTF-8") from None
                for values in zip(*values_of, strict=True):
                    row += 1
                    yield f"{name} row {row}", list(values)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = first_line(error)
        if "duplicate field names" in said:
            which = " or ".join(f"'{column}'" for column in columns)
            raise DataError(f"{name}: column {which} has a field twice in it; write it with one") from None
        if head.startswith(b"PARE") or "crypt" in said.lower():
            raise DataError(f"{name}: encrypted Parquet; decrypt it and write it without encryption") from None
        raise DataError(f"{name}: damaged or not Parquet ({said}); fetch or make the file again") from None

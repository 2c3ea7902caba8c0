"""Rows out of one file: JSON lines, Parquet or plain text, told apart by suffix, also compressed with gzip or zstd."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.manifest import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst")
KNOWN = ".jsonl, .ndjson, .json (one object a line), .txt (each file is one document; all also .gz or .zst), .parquet"
BATCH_ROWS, BLOCK_BYTES = 512, 2**20


def split_suffix(name: str) -> tuple[str, str]:
    """(format suffix, compression suffix or "") of a file name.

    Raises:
        DataError: the suffix says no format that is read here.
    """
    path = Path((name.split("?")[0] if "://" in name else name).lower())
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    form = Path(path.name.removesuffix(compression)).suffix
    if form not in (*JSON_LINES, ".txt", ".parquet") or (form == ".parquet" and compression):
        raise DataError(f"{name}: its suffix says no known format; name the file one of {KNOWN}")
    return form, compression


def rows(path: Path, name: str, columns: list[str], advance: Callable[[int], None]) -> Iterator[tuple[str, list[Any]]]:
    """(where it stands, values of `columns`) of each row of a file, in order.

    A plain text file is one row with the column "text". `name` is what messages call the file, `advance` is told the
    bytes read.

    Raises:
        DataError: the file is damaged or lacks a column.
        OSError: the file cannot be read.
    """
    form, compression = split_suffix(name)
    try:
        if form == ".parquet":
            yield from _parquet(path, name, columns, advance)
        elif form == ".txt":
            yield from _plain(path, name, columns, compression, advance)
        else:
            yield from _json_lines(path, name, columns, compression, advance)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        how = compression.replace(".gz", "gzip").replace(".zst", "zstd")
        raise DataError(f"{name}: damaged or cut-off {how} ({error}); fetch or compress the file again") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind = {".parquet": "Parquet", ".txt": "text"}.get(form, "JSON lines") + (" in zstd" if compression else "")
        raise DataError(f"{name}: damaged or no {kind} ({_first_line(error)}); fetch or make the file again") from None


def _blocks(path: Path, compression: str, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Decompressed blocks of a file."""
    at = 0
    with open(path, "rb") as raw:
        file: BinaryIO = raw
        if compression and not path.stat().st_size:
            raise EOFError("0 bytes")  # even nothing, compressed, is some bytes: the file was not written to its end
        if compression == ".gz":
            file = gzip.GzipFile(fileobj=raw, mode="rb")
        elif compression == ".zst":
            file = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        while block := file.read(BLOCK_BYTES):
            yield block
            advance(raw.tell() - at)
            at = raw.tell()


def _plain(
    path: Path, name: str, columns: list[str], compression: str, advance: Callable[[int], None]
) -> Iterator[tuple[str, list[Any]]]:
    try:
        text = b"".join(_blocks(path, compression, advance)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    yield name, _chosen(name, {"text": text}, columns)


def _json_lines(
    path: Path, name: str, columns: list[str], compression: str, advance: Callable[[int], None]
) -> Iterator[tuple[str, list[Any]]]:
    for number, line in enumerate(_lines(_blocks(path, compression, advance)), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8; convert the file to UTF-8") from None
        except ValueError as error:
            raise DataError(f"{where}: no JSON ({error}); each line must be one JSON object") from None
        except RecursionError:
            raise DataError(f"{where}: JSON nested too deeply; remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}; each line must be one JSON object")
        yield where, _chosen(where, row, columns)


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        first, *others = block.split(b"\n")
        rest += first
        if others:
            yield rest
            yield from others[:-1]
            rest = others[-1]
    if rest:
        yield rest


def _parquet(
    path: Path, name: str, columns: list[str], advance: Callable[[int], None]
) -> Iterator[tuple[str, list[Any]]]:
    # Read in pieces instead of whole row groups: those of 500 MB exist.
    with pq.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
        there = file.schema_arrow.names
        for column in columns:
            if column not in there:
                raise _no_column(name, column, there)
        size, count, row = path.stat().st_size, file.metadata.num_rows, 0
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            advance(size * (row + len(batch)) // count - size * row // count)
            try:
                values_of = [batch.column(column).to_pylist() for column in columns]
            except UnicodeDecodeError:
                raise DataError(
                    f"{name} rows {row + 1} to {row + len(batch)}: a text is not UTF-8; write the file again in UTF-8"
                ) from None
            for values in zip(*values_of, strict=True):
                row += 1
                yield f"{name} row {row}", list(values)


def _chosen(where: str, row: dict[str, Any], columns: list[str]) -> list[Any]:
    try:
        return [row[column] for column in columns]
    except KeyError as error:
        raise _no_column(where, error.args[0], list(row)) from None


def _no_column(where: str, column: str, columns: list[str]) -> DataError:
    listed = ", ".join(columns[:20]) + (", …" if len(columns) > 20 else "")
    return DataError(f"{where}: no column '{column}'; columns are {listed or 'none'}; set text_column to one of them")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

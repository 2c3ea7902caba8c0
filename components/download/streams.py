"""Decompress one file; a file that does not match its suffix is refused with the format it really has.

Only the name says how to read a file. Files with a wrong name are mostly of a few kinds: a Git LFS pointer, a login
page, a file that was compressed or decompressed in transfer, text in another encoding. The first bytes tell which.
"""

from __future__ import annotations

import gzip
import io
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.errors import DataError, first_line

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
BLOCK_BYTES, HEAD_BYTES = 2**20, 4096
TAKEN_WINDOW = 2**27  # of zstd; a longer one needs an option that Arrow does not have
BOM = b"\xef\xbb\xbf"
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MAGIC = {
    "gzip": rb"\x1f\x8b\x08",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # the second is a skippable frame
    "bzip2": rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)",
    "xz": rb"\xfd7zXZ\0",
    "a zip archive": rb"PK\x03\x04",
    "Parquet": rb"PAR1\x15",
}
PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml|head|body)\b", re.IGNORECASE)
LFS = b"version https://git-lfs.github.com/spec/"


def blocks(path: Path, name: str, form: str, compression: str, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield decompressed blocks of a text file, without a UTF-8 BOM; `name` is its name in messages.

    `advance` receives the number of bytes read.

    Raises:
        DataError: it is truncated or damaged, or does not match its suffixes `form` and `compression`.
        OSError: it cannot be read.
    """
    with open(path, "rb") as raw:
        head = raw.read(HEAD_BYTES)
        raw.seek(0)
        check_head(name, head, form, compression)
        at, first = 0, True
        for block in _decompressed(raw, name, compression, head):
            if first:
                check_head(name, block[:HEAD_BYTES], form)
                block = block.removeprefix(BOM)
            first = False
            yield block
            advance(raw.tell() - at)
            at = raw.tell()


def check_head(name: str, head: bytes, form: str, compression: str = "") -> None:
    """Refuse a file whose first bytes do not match its suffixes.

    Raises:
        DataError
    """
    if head.startswith(LFS):
        raise DataError(f"{name}: a Git LFS pointer; run git lfs pull")
    expected = COMPRESSIONS.get(compression) or ("Parquet" if form == ".parquet" else "")
    kind = next((kind for kind, magic in MAGIC.items() if re.match(magic, head)), "")
    if kind and kind != expected:
        suffix = next((suffix for suffix, known in COMPRESSIONS.items() if known == kind), "")
        remedy = (
            f"name it {name.removesuffix(compression)}{suffix}" if suffix else "unpack it or give it its own suffix"
        )
        raise DataError(f"{name}: {kind}, which its name does not say; {remedy}")
    if form != ".txt" and PAGE.match(head):
        raise DataError(
            f"{name}: a web page (HTML or XML), not data; open its address in a browser, then fetch the file"
        )
    if head and not head.strip(b"\0"):
        raise DataError(f"{name}:1: a line of NUL bytes; fetch the file again")
    if expected:
        if compression and not kind and head:
            raise DataError(
                f"{name}: damaged or cut-off {expected} (it begins {head[:16]!r}); fetch or compress the file again, "
                f"or name it without {compression} if it is not compressed"
            )
        return
    encoding = next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), "") or _wide(head)
    if encoding:
        raise DataError(f"{name}:1: {encoding}; {_convert(name, encoding.split()[0].lower())}")


def _wide(head: bytes) -> str:
    """Detect UTF-16 without a BOM: every other byte of its ASCII characters is NUL."""
    some = head[: len(head) // 2 * 2]
    for start, encoding in ((1, "UTF-16LE without a BOM"), (0, "UTF-16BE without a BOM")):
        zeros, others = some[start::2].count(0), some[1 - start :: 2].count(0)
        if len(some) >= 4 and zeros > len(some) / 4 and not others:
            return encoding
    return ""


def _decompressed(raw: BinaryIO, name: str, compression: str, head: bytes) -> Iterator[bytes]:
    if not compression:
        while block := raw.read(BLOCK_BYTES):
            yield block
        return
    import pyarrow as pa  # imported late, as below: a run that finds all its parts opens no file

    try:
        if not head:
            raise EOFError("0 bytes")  # even empty input compresses to some bytes: the file is truncated
        file = _opened(raw, compression)
        while block := file.read(BLOCK_BYTES):
            yield block
    except (zlib.error, EOFError, OSError, pa.ArrowException, *_of_xz()) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind, said = COMPRESSIONS[compression], first_line(error)
        if "too much memory" in said:
            window = window_bytes(head) or 0
            known = window > TAKEN_WINDOW  # else a later frame needs it
            size, power = (f"{window / 2**30:g} GiB", (window - 1).bit_length()) if known else ("over 128 MiB", 31)
            remedy = f"run zstd -d --long={power} and compress it again"
            raise DataError(f"{name}: compressed with a window of {size}; {remedy}") from None
        raise DataError(f"{name}: damaged or cut-off {kind} ({said}); fetch or compress the file again") from None


def _opened(raw: BinaryIO, compression: str) -> io.BufferedIOBase:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if compression == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    if compression == ".bz2":
        import bz2

        return bz2.BZ2File(raw)
    import lzma

    return lzma.LZMAFile(raw)


def _of_xz() -> tuple[type[Exception], ...]:
    try:
        from lzma import LZMAError
    except ImportError:  # Python was built without it
        return ()
    return (LZMAError,)


def window_bytes(head: bytes) -> int | None:
    """Window size of a zstd file's first frame (RFC 8878, 3.1.1.1); None if the head is too short."""
    while re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):
        head = head[8 + int.from_bytes(head[4:8], "little") :]
    if len(head) < 18:
        return None
    descriptor, body = head[4], head[5:]
    if not descriptor & 0x20:
        base = 1 << (10 + (body[0] >> 3))
        return base + base // 8 * (body[0] & 7)
    body = body[(0, 1, 2, 4)[descriptor & 3] :]  # dictionary id
    return int.from_bytes(body[: (1, 2, 4, 8)[descriptor >> 6]], "little")


def not_utf8(where: str, data: bytes, at: int) -> DataError:
    """The message for text that is not UTF-8 at byte `at`, with its likely encoding.

    Args:
        where: the file, or file:line.
    """
    text = data[max(at - 2**15, 0) : at + 2**15].decode("utf-8", "replace")
    foreign = [character for character in text if character > "\x7f"]
    if foreign.count("\ufffd") * 10 < len(foreign):
        return DataError(
            f"{where}: not UTF-8 at byte {at}, though the rest is; it is damaged, fetch it again or fix it"
        )
    encoding = _guessed(data[at : at + 2**15])
    convert = _convert(re.sub(r":\d+$", "", where), encoding or "ENCODING")
    return DataError(f"{where}: not UTF-8 at byte {at}{f', perhaps {encoding}' if encoding else ''}; {convert}")


def _convert(name: str, encoding: str) -> str:
    """The remedy: a command that writes an uncompressed second file beside the first."""
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    plain = name.removesuffix(compression)
    suffix = Path(plain).suffix
    old, new = shlex.quote(name), shlex.quote(f"{plain.removesuffix(suffix)}.utf8{suffix}")
    read = f"{COMPRESSIONS[compression]} -dc {old} | iconv" if compression else "iconv"
    return f"convert the file to UTF-8: {read} -f {encoding} -t utf-8{'' if compression else f' {old}'} > {new}"


def _guessed(data: bytes) -> str:
    """cp949 if most non-ASCII bytes would be common Hangul, two high bytes each; else a Windows code page."""
    foreign = sum(byte > 0x7F for byte in data)
    common = re.findall(rb"[\xb0-\xc8][\xa1-\xfe]", data)
    if len(common) * 4 > foreign and data.decode("cp949", "replace").count("\ufffd") * 10 <= len(common):
        return "cp949"
    try:
        western = [character for character in data.decode("cp1252") if character > "\x7f"]
    except UnicodeDecodeError:
        return ""
    return "cp1252" if sum(map(str.isalpha, western)) * 2 > len(western) and len(western) * 3 < len(data) else ""

"""The rows of each kind of file, and the messages about files that are almost of that kind."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
import shutil
import struct
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.download import jsonlines, tables
from components.download.readers import rows
from trainer.data.manifest import DataError

TEXTS = ['첫째 문서, "인용"\n두 줄', "Second \U0001f600", "third"]
LINES = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()
CSV = 'id,text\n0,"첫째 문서, ""인용""\n두 줄"\n1,Second \U0001f600\r\n\n2,third'.encode()
TSV = re.sub(rb"(?m)^(id|\d),", rb"\1\t", CSV)


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
SKIPPED_FRAME = struct.pack("<II", 0x184D2A50, 5) + b"12345"


def texts(path: Path, column: str = "text") -> list[Any]:
    return [value for _, (value,) in rows(path, path.name, [column], lambda _: None)]


def read(folder: Path, name: str, data: bytes, column: str = "text") -> list[Any]:
    (folder / name).write_bytes(data)
    return texts(folder / name, column)


def refused(folder: Path, name: str, data: bytes | None, column: str = "text") -> str:
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        texts(folder / name, column)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(name)
    return str(caught.value)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_kind_gives_the_same_texts_packed_or_not_with_a_mark_or_without(
    tmp_path: Path, suffix: str, mark: bytes
) -> None:
    pack = PACK[suffix]
    assert read(tmp_path, f"a.jsonl{suffix}", pack(mark + LINES)) == TEXTS
    assert read(tmp_path, f"a.csv{suffix}", pack(mark + CSV)) == TEXTS
    assert read(tmp_path, f"a.tsv{suffix}", pack(mark + TSV)) == TEXTS
    assert read(tmp_path, f"a.txt{suffix}", pack(mark + TEXTS[0].encode())) == TEXTS[:1]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_of_several_members_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    pack = PACK[suffix]
    parts = [pack(b""), pack(b"\xef\xbb\xbf" + LINES), pack(LINES[:20]), pack(LINES[20:])]
    if suffix == ".zst":
        parts = [SKIPPED_FRAME, *parts, SKIPPED_FRAME]
    assert read(tmp_path, f"a.jsonl{suffix}", b"".join(parts)) == TEXTS * 2
    assert "damaged or cut-off" in refused(tmp_path, f"a.jsonl{suffix}", (pack(LINES) * 2)[:-5])


@pytest.mark.skipif(shutil.which("zstd") is None, reason="makes its input with zstd")
@pytest.mark.parametrize(("power", "size"), [(28, "0.25 GiB"), (31, "2 GiB")])
def test_a_long_window_of_zstd_is_named_with_what_reads_it(tmp_path: Path, power: int, size: str) -> None:
    packed = subprocess.run(["zstd", "-qc", f"--long={power}"], input=LINES, capture_output=True, check=True).stdout
    said = f"compressed with a window of {size}; run zstd -d --long={power} and compress it again"
    assert refused(tmp_path, "a.jsonl.zst", packed).endswith(said)
    assert refused(tmp_path, "a.jsonl.zst", SKIPPED_FRAME + packed).endswith(said)
    assert f"--long={31}" in refused(tmp_path, "a.jsonl.zst", zstd(LINES) + packed)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
KOREAN = "한국어로 쓴 글입니다. 문장이 몇 개 더 있습니다."
KOREAN_LINE = json.dumps({"text": KOREAN}, ensure_ascii=False)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz", "a.csv.zst"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (POINTER, ": a Git LFS pointer; run git lfs pull"),
        (PAGE, ": a web page (HTML or XML), not data; open its address in a browser, then fetch the file"),
        (b"PK\x03\x04\x14\0\0\0\x08\0abcd", ": a zip archive, which its name does not say; unpack it or"),
        (lzma.compress(LINES), ": xz, which its name does not say; name it {}.xz"),
        (b"\0" * 5000, ":1: a line of NUL bytes; fetch the file again"),
    ],
)
def test_what_is_something_else_than_its_name_is_called_what_it_is(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    if data is PAGE and name == "a.txt":
        assert read(tmp_path, name, data) == [PAGE.decode()]
        return
    packed = name.endswith((".gz", ".zst"))
    assert said.format(name.rpartition(".")[0] if packed else name) in refused(tmp_path, name, data)
    if packed and data is not PAGE:
        inside = PACK[name[name.rindex(".") :]](data)
        assert said.partition("{}")[0] in refused(tmp_path, name, inside)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", gzip.compress(LINES), "gzip, which its name does not say; name it a.jsonl.gz"),
        ("a.jsonl.gz", zstd(LINES), "zstd, which its name does not say; name it a.jsonl.zst"),
        ("a.jsonl.gz", LINES, "or name it without .gz if it is not compressed"),
        ("a.jsonl.xz", LINES, "or name it without .xz if it is not compressed"),
        ("a.jsonl.bz2", b"", "damaged or cut-off bzip2 (0 bytes)"),
        ("a.jsonl", b"[\n" + LINES.replace(b"}\n", b"},\n") + b"]\n", "a.jsonl:1: a list; each line must be"),
        ("a.json", json.dumps([{"text": "x"}] * 9).encode(), "as jq -c '.[]' writes them"),
        ("a.json", json.dumps({"text": "x", "n": [1]}, indent=1).encode(), "over several lines, jq -c . writes it"),
        ("a.jsonl", LINES[:-7], "a.jsonl:3: not JSON (the line ends too early)"),
        ("a.jsonl", b'{"text": "cut', "a.jsonl:1: not JSON (the line ends too early)"),
        ("a.jsonl", LINES + b"\0\0\0\0\n", "a.jsonl:4: a line of NUL bytes; fetch the file again"),
        ("a.jsonl", LINES + b'{"text": "\0"}', "a.jsonl:4: not JSON (NUL bytes in it; fetch the file again)"),
        ("a.jsonl", LINES + b"{'text': 'x'}\n", "(Expecting property name enclosed in double quotes at char"),
        ("a.jsonl", b'{"text": "x", "text": "y"}\n', "a.jsonl:1: has the column 'text' twice"),
        ("a.jsonl", LINES + b'{"body": "x"}\n', "a.jsonl:4: no column 'text', which other rows have; this one has"),
        ("a.jsonl", b'{"body": "x"}\n\n' + LINES, "a.jsonl:1: no column 'text', which other rows have; this one has"),
        ("a.jsonl", b'{"body": "x"}\n{"body": "y"}\n', "columns are body; set text_column to one of them"),
        ("a.jsonl", b"{}\n", "a.jsonl:1: no column 'text'; columns are none"),
        (
            "a.jsonl",
            LINES + KOREAN_LINE.encode("euc-kr"),
            "perhaps cp949; convert the file to UTF-8: iconv -f cp949 -t utf-8",
        ),
        ("a.txt", ("ASCII first. " * 9 + KOREAN).encode("cp949"), "at byte 117, perhaps cp949; convert"),
        ("a.csv", ("id,text\n1," + KOREAN).encode("cp949"), "a.csv:2: not UTF-8 at byte 2, perhaps cp949"),
        ("a.txt", "Déjà vu, garçon? Une phrase en français.".encode("cp1252"), "perhaps cp1252; convert the file"),
        ("a.txt", "日本語の文章です。".encode("shift_jis"), "iconv -f ENCODING -t utf-8"),
        ("a.txt", ("한글 " * 50).encode()[:-2], "though the rest is; it is damaged, fetch it again or fix it"),
        ("a.csv", b"", None),
        ("a.csv", b"id,text\n1,x\n2\n", "a.csv:3: 1 fields, the header has 2; put fields with commas or line"),
        ("a.csv", b"id,text\n1,x,y\n", "a.csv:2: 3 fields, the header has 2"),
        ("a.csv", b"1,A sentence\n2,Another\n", "no column 'text'; the first line must name the columns and has 1, A"),
        ("a.csv", b"id;text\n1;x\n", "a.csv:1: fields are separated by semicolons; write them with commas"),
        ("a.tsv", b"id,text\n1,x\n", "fields are separated by commas; write them with tabs"),
        ("a.csv", b"text,text\nx,y\n", "a.csv:1: has the column 'text' twice"),
        ("a.csv", b'id,text\n1,"x\n2,y\n', "a.csv:2: no CSV (unexpected end of data); close double quotes"),
        ("a.csv", b'id,text\n1,"x"y\n', "a.csv:2: no CSV"),
    ],
)
def test_what_is_nearly_right_is_told_what_is_wrong(tmp_path: Path, name: str, data: bytes, said: str | None) -> None:
    if said is None:
        assert read(tmp_path, name, data) == []
    else:
        assert said in refused(tmp_path, name, data)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz"])
def test_wide_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    pack = PACK[".gz"] if name.endswith(".gz") else bytes
    called = encoding[:6].upper()
    said = refused(tmp_path, name, pack(("\ufeff" + LINES.decode()).encode(encoding)))
    assert f":1: {called}; convert the file to UTF-8: " in said and f"iconv -f {called.lower()} -t utf-8 " in said
    if encoding.startswith("utf-16"):
        unmarked = f":1: {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')} without a BOM; convert"
        assert unmarked in refused(tmp_path, name, pack(LINES.decode().encode(encoding)))


@pytest.mark.skipif(not shutil.which("iconv"), reason="iconv is not installed")
@pytest.mark.parametrize("name", ["a.jsonl", "my texts.v1.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_the_command_that_converts_a_file_does_so(tmp_path: Path, name: str) -> None:
    suffix = Path(name).suffix
    packed = PACK.get(suffix, bytes)(LINES.splitlines()[0] + b"\n" + KOREAN_LINE.encode("cp949"))
    command = refused(tmp_path, name, packed).partition("convert the file to UTF-8: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert texts(tmp_path / f"{name.partition('.jsonl')[0]}.utf8.jsonl") == [TEXTS[0], json.loads(KOREAN_LINE)["text"]]


def test_what_json_allows_is_read(tmp_path: Path) -> None:
    data = b'{"text": "x", "n": ' + b"7" * 5000 + b', "m": NaN, "text": "x"}\r\n\r\n {"n": {"text": 1}, "text": "y"}'
    assert read(tmp_path, "a.jsonl", data) == ["x", "y"]
    assert read(tmp_path, "b.jsonl", LINES.replace(b"\n", b"\r")) == TEXTS
    assert read(tmp_path, "c.csv", CSV.replace(b"\r\n", b"\n").replace(b"\n", b"\r")) == TEXTS


def test_a_long_line_is_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonlines, "LONGEST_LINE", 2**21)
    line = b'{"text": "' + b"x" * 2**20 + b'"}\n'
    assert list(map(len, read(tmp_path, "a.jsonl", line * 3))) == [2**20] * 3
    assert "a line of more than" in refused(tmp_path, "a.jsonl", line + b"x" * 2**22)
    tracemalloc.start()
    try:
        list(jsonlines.lines(iter([b"x" * 1000] * 2000), "a"))
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()


def test_a_field_that_is_too_long_is_a_quote_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(tmp_path, "a.csv", b"text\n" + b"x" * 10**6) == ["x" * 10**6]
    monkeypatch.setattr(tables, "LONGEST_FIELD", 10**5)
    said = refused(tmp_path, "a.csv", b'text\n"open\n' + b"more of it\n" * 10**5)
    assert "a.csv:2: no CSV (field larger than field limit (100000)); close double quotes" in said


def parquet(path: Path, table: pa.Table, **how: Any) -> Path:
    pq.write_table(table, path, **how)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.string_view()),
        pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    ],
)
def test_every_kind_of_string_column_is_read(tmp_path: Path, column: Any) -> None:
    table = pa.table({"text": column, "Text": ["other"] * 3, "none": pa.nulls(3)})
    path = parquet(tmp_path / "a.parquet", table)
    assert (texts(path), texts(path, "Text"), texts(path, "none")) == (TEXTS, ["other"] * 3, [None] * 3)


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    names = ["text", "text", "id", "m", "m", "m"]
    path = parquet(tmp_path / "two.parquet", pa.Table.from_arrays([pa.array(["x"])] * 6, names=names))
    assert refused(tmp_path, path.name, None) == (
        "two.parquet: has the column 'text' twice; keep one of them, or set text_column to one that occurs once"
    )
    assert "has the column 'm' 3 times" in refused(tmp_path, path.name, None, "m")
    assert texts(path, "id") == ["x"]


def test_a_field_that_is_twice_in_a_struct_is_named(tmp_path: Path) -> None:
    struct_of = pa.StructArray.from_arrays([pa.array(["u"]), pa.array(["v"])], names=["role", "role"])
    path = parquet(tmp_path / "a.parquet", pa.table({"m": struct_of, "text": ["x"]}))
    assert texts(path) == ["x"]
    assert "a.parquet: column 'm' has a field twice in it" in refused(tmp_path, path.name, None, "m")


def test_parquet_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", pa.table({"text": TEXTS * 500}), compression="none")
    whole = path.read_bytes()
    assert "a.parquet: 0 bytes" in refused(tmp_path, "a.parquet", b"")
    assert "damaged or not Parquet" in refused(tmp_path, "a.parquet", whole[:-30])
    assert "damaged or not Parquet" in refused(tmp_path, "a.parquet", LINES)
    assert "Parquet, which its name does not say; unpack it or give" in refused(tmp_path, "a.jsonl", whole)
    assert "no column 'text'; columns are none" in refused(
        tmp_path, parquet(tmp_path / "none.parquet", pa.table({})).name, None
    )
    encrypted = b"PARE" + whole[4:-4] + b"PARE"
    assert "encrypted Parquet; decrypt it" in refused(tmp_path, "a.parquet", encrypted)


def test_a_changed_byte_of_a_page_with_a_checksum_is_found(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet", pa.table({"text": ["needle"] * 3}), compression="none", write_page_checksum=True
    )
    assert "damaged or not Parquet" in refused(tmp_path, path.name, path.read_bytes().replace(b"needle", b"noodle", 1))


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Data with one to three flipped bytes, cuts and insertions."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at : at + rng.randint(1, 40)]
        elif kind == 2:
            changed[at:at] = rng.choice([b"\0" * 9, b'"', b"\n", b"\xff\xfe", b"{[,", rng.randbytes(5)])
        else:
            del changed[at:]
    return bytes(changed)


@pytest.mark.parametrize(
    "kind", [*(f"a{form}{pack}" for form in (".jsonl", ".csv", ".txt") for pack in PACK), "a.parquet"]
)
def test_damage_is_read_or_named_in_one_line(tmp_path: Path, kind: str) -> None:
    if kind == "a.parquet":
        whole = parquet(tmp_path / kind, pa.table({"id": [0, 1, 2], "text": TEXTS})).read_bytes()
    else:
        form = kind.split(".")[1]
        content = {"jsonl": LINES, "csv": CSV, "txt": TEXTS[0].encode()}[form]
        whole = PACK[kind[2 + len(form) :]](content)
    rng = random.Random(kind)
    read_well = 0
    for _ in range(100):
        (tmp_path / kind).write_bytes(damaged(rng, whole))
        try:
            texts(tmp_path / kind)
            read_well += 1
        except DataError as error:
            assert str(error).startswith(kind) and "\n" not in str(error)
    assert read_well < 100

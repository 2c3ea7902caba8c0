"""Shards against golden bytes and a reader written only from the format's description."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from trainer.data import format as shards
from trainer.data.format import Shard, ShardWriter, token_dtype
from trainer.data.manifest import DataError

GOLDEN_IDX = bytes.fromhex(
    "4d4d4944494458 0000"  # magic
    "0100000000000000"  # version
    "08"  # uint16
    "0300000000000000"  # sequences
    "0400000000000000"  # documents + 1
    "03000000 01000000 02000000"  # lengths
    "0000000000000000 0600000000000000 0800000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # documents
)
GOLDEN_BIN = bytes.fromhex("0102 ffff 0000 0000 0700 0000")
DOCUMENTS = [[0x0201, 0xFFFF, 0], [0], [7, 0]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16", at_once: int = 1) -> None:
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for first in range(0, len(documents), at_once):
            some = documents[first : first + at_once]
            writer.append(np.concatenate(some).astype(dtype), np.array([len(d) for d in some]))


def independent_read(prefix: Path) -> list[list[int]]:
    """A reader of Megatron's format that shares nothing with ours."""
    idx, data = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    magic, version, code, count, boundaries = struct.unpack_from("<9sQBQQ", idx)
    assert (magic, version, boundaries) == (b"MMIDIDX\0\0", 1, count + 1)
    letter, width = {4: ("i", 4), 8: ("H", 2)}[code]
    lengths = struct.unpack_from(f"<{count}i", idx, 34)
    offsets = struct.unpack_from(f"<{count}q", idx, 34 + 4 * count)
    documents = struct.unpack_from(f"<{boundaries}q", idx, 34 + 12 * count)
    assert documents == tuple(range(count + 1)) and len(idx) == 34 + 12 * count + 8 * boundaries
    assert len(data) == sum(lengths) * width
    return [list(struct.unpack_from(f"<{n}{letter}", data, at)) for n, at in zip(lengths, offsets, strict=True)]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_bytes_are_golden_however_they_are_appended(tmp_path: Path, at_once: int) -> None:
    write(tmp_path / "a", DOCUMENTS, at_once=at_once)
    assert (tmp_path / "a.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_reads_golden_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(GOLDEN_IDX)
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
    shard = Shard(tmp_path / "a")
    assert [shard.document(i).tolist() for i in range(len(shard))] == DOCUMENTS
    assert shard.document(0, 1, 3).tolist() == [0xFFFF, 0]
    assert shard.num_tokens == 6


@pytest.mark.parametrize("blocks", [3, 1000])
def test_independent_reader_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    monkeypatch.setattr(shards, "BLOCK", blocks)  # the index is written and checked in blocks: cover their boundaries
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 70_000, rng.integers(1, 9)).tolist() for _ in range(100)]
    write(tmp_path / "a", documents, "int32", at_once=7)
    assert independent_read(tmp_path / "a") == documents
    shard = Shard(tmp_path / "a")
    assert [shard.document(i).tolist() for i in range(100)] == documents


def test_size_is_that_of_the_format(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", np.dtype("uint16")) as writer:
        writer.append(np.zeros(35_000, "uint16"), np.ones(35_000, int))
    assert (tmp_path / "a.idx").stat().st_size == 700_042


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "<u2"), (65_536, "<u2"), (65_537, "<i4")])
def test_type_follows_the_largest_id(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    document = [vocab_size - 1, 0]
    write(tmp_path / "a", [document], token_dtype(vocab_size).name)
    assert Shard(tmp_path / "a").document(0).tolist() == document == independent_read(tmp_path / "a")[0]


def test_every_truncation_is_refused_and_named(tmp_path: Path) -> None:
    for name, golden in (("a.idx", GOLDEN_IDX), ("a.bin", GOLDEN_BIN)):
        (tmp_path / "a.idx").write_bytes(GOLDEN_IDX)
        (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
        for size in range(len(golden)):
            (tmp_path / name).write_bytes(golden[:size])
            with pytest.raises(DataError, match=name):
                Shard(tmp_path / "a")


def test_every_flipped_bit_of_the_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
    for bit in range(8 * len(GOLDEN_IDX)):
        changed = bytearray(GOLDEN_IDX)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.idx").write_bytes(changed)
        with pytest.raises(DataError, match=r"a\.(idx|bin)"):
            Shard(tmp_path / "a")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a", np.dtype("uint16")) as writer:
        writer.append(np.zeros(1, "uint16"), np.ones(1, int))
        raise RuntimeError
    assert not list(tmp_path.iterdir())

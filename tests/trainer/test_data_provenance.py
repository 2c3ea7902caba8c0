"""The list of origins beside a shard: golden bytes, and refusal of everything damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.data.manifest import DataError
from trainer.data.provenance import Origin, Origins, OriginsWriter

FILES = ["ko/part-00000.jsonl", "ko/글.jsonl"]
GOLDEN = (
    b"YAODOCS1"
    + bytes.fromhex("27000000")
    + b'["ko/part-00000.jsonl", "ko/\xea\xb8\x80.jsonl"]'
    + bytes.fromhex("00000000 0000000000000000")
    + bytes.fromhex("00000000 0a00000000000000")
    + bytes.fromhex("01000000 0000000001000000")
)


def test_bytes_are_golden_and_read_back(tmp_path: Path) -> None:
    writer = OriginsWriter(tmp_path / "a", FILES)
    writer.append(0, np.array([0, 10]))
    writer.append(1, np.array([2**32]))
    assert not (tmp_path / "a.docs").exists(), "nothing under the final name before it is whole"
    writer.close()
    assert (tmp_path / "a.docs").read_bytes() == GOLDEN
    origins = Origins(tmp_path / "a", 3)
    assert [origins[n] for n in range(len(origins))] == [
        Origin(FILES[0], 0),
        Origin(FILES[0], 10),
        Origin(FILES[1], 2**32),
    ]


def test_a_missing_cut_or_foreign_file_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.docs: missing"):
        Origins(tmp_path / "a", 3)
    for size in range(len(GOLDEN)):
        (tmp_path / "a.docs").write_bytes(GOLDEN[:size])
        with pytest.raises(DataError, match=r"a\.docs: damaged"):
            Origins(tmp_path / "a", 3)
    (tmp_path / "a.docs").write_bytes(GOLDEN)
    with pytest.raises(DataError, match=r"4 documents need"):
        Origins(tmp_path / "a", 4)
    (tmp_path / "a.docs").write_bytes(GOLDEN[:-12] + bytes.fromhex("02000000 0000000000000000"))
    with pytest.raises(DataError, match="names files that are not in its table"):
        Origins(tmp_path / "a", 3)

"""Reads the files of W&B's offline mode: LevelDB's log format around W&B's own protobuf messages.

https://github.com/google/leveldb/blob/main/doc/log_format.md; W&B's file begins with 7 bytes of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, IDENT = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), IDENT, b""
    assert data.startswith(b":W&B")
    while position + HEADER <= len(data):
        if (left := BLOCK - position % BLOCK) < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record

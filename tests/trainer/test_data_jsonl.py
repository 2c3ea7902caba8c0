from __future__ import annotations

from pathlib import Path

import pytest

from trainer.data.jsonl import documents
from trainer.data.manifest import DataError

LINES = ['{"text": "가나다"}', '{"text": ""}', '{"id": 3, "text": "a\\nb"}', '{"text": "last"}']
TEXTS = ["가나다", "", "a\nb", "last"]


@pytest.mark.parametrize("end", ["\n", ""])
def test_every_cut_of_the_file_gives_each_document_once(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(LINES) + end)
    size = path.stat().st_size
    for first in range(size + 1):
        for second in range(first, size + 1):
            bounds = [(0, first), (first, second), (second, size)]
            assert [text for start, stop in bounds for _, text in documents(path, start, stop)] == TEXTS


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{broken", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"body": "x"}', 'no field "text"'),
        (b'{"text": null}', 'not a JSON object whose "text" is a string'),
        (b"[1]", 'not a JSON object whose "text" is a string'),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b'{"text": "\\ud800"}', "not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 7 + line + b"\n" + b'{"text": "y"}\n')
    with pytest.raises(DataError) as caught:
        list(documents(path, 20, path.stat().st_size))
    assert str(caught.value) == f"{path}:8: {problem}; fix or remove the line"

"""A download's journal that the disk damaged: the source is read again, and the result is the same as before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from components.download import source
from components.download.step import run
from components.download.writer import JOURNAL_NAME, read_journal
from manifests.spec import JobSpec
from trainer.data.manifest import DataError

TEXTS = [f"Text {n}." for n in range(30)]


@pytest.fixture
def remote_job(
    make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[JobSpec, Path]]:
    """A job on a file elsewhere, with parts of a few texts each, and the folder of its source."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/journal/a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    monkeypatch.setattr(source, "PART_BYTES", 100)
    job = make_job({"web": {"kind": "files", "paths": ["memory://journal/a.jsonl"]}}, tmp_path)
    yield job, Path(job.stage_dir("raw")) / "web"
    memory.rm("/journal", recursive=True)


def _texts(folder: Path) -> list[str]:
    parts = sorted(folder.glob("part-*.jsonl"))
    return [json.loads(line)["text"] for part in parts for line in part.read_bytes().splitlines()]


def test_a_flipped_bit_of_it_is_not_taken_for_what_was_written(
    remote_job: tuple[JobSpec, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    job, folder = remote_job
    run(job)
    journal = folder / JOURNAL_NAME
    written, good = read_journal(folder), journal.read_bytes()
    assert written is not None and len(written.parts) == 3
    capsys.readouterr()
    for at in range(len(good)):
        journal.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        assert read_journal(folder) is None, (at, good[at - 9 : at + 9])
    for cut in (b"", b"{", good[:40], good[:-1], good + b"\n"):
        journal.write_bytes(cut)
        assert read_journal(folder) is None, cut
    said = set(capsys.readouterr().out.splitlines())
    assert said == {"download web: journal.json is damaged or of another version; the source is read again"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", "7"), ("documents", "7"), ("text_bytes", "999"), ("missing", "1"), ("revision", '"0123456789abcdef"')],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_field_changes_nothing(
    remote_job: tuple[JobSpec, Path], monkeypatch: pytest.MonkeyPatch, field: str, value: str, finished: bool
) -> None:
    job, folder = remote_job
    golden = run(job)
    if not finished:
        for path in folder.iterdir():
            path.unlink()
        real, made = source.write_part, list[object]()

        def failing(*arguments: object) -> object:
            if len(made) == 2:
                raise DataError("gone")
            made.append(real(*arguments))  # type: ignore[arg-type]
            return made[-1]

        with monkeypatch.context() as patched:
            patched.setattr(source, "write_part", failing)
            with pytest.raises(DataError, match="gone"):
                run(job)
        assert len(list(folder.glob("part-*.jsonl"))) == 2
    lines = (folder / JOURNAL_NAME).read_text().splitlines()
    at = max(n for n, line in enumerate(lines) if f'"{field}":' in line)
    lines[at] = lines[at].split(":")[0] + f": {value}" + ("," if lines[at].endswith(",") else "")
    (folder / JOURNAL_NAME).write_text("\n".join(lines))
    assert run(job) == golden
    assert _texts(folder) == TEXTS

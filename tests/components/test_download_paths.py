"""Which files a path or pattern selects: on this machine, in a bucket and on the Hub."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from test_download_refused import LINES, from_files, raw_texts, refused

from components.download import hub
from components.download.files import list_inputs
from components.download.localpaths import find_local, shown
from components.download.step import run
from manifests.dataspec import FilesSource
from manifests.spec import JobSpec
from trainer.data.manifest import DataError

NFC, NFD = unicodedata.normalize("NFC", "한글 é"), unicodedata.normalize("NFD", "한글 é")


def named(folder: Path, *patterns: str) -> list[str]:
    """The files that patterns in the folder select, relative to it."""
    inputs = list_inputs(FilesSource(paths=[*patterns]), [], str(folder))
    return [os.path.relpath(one.location, folder) for one in inputs]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(LINES)
        return tmp_path

    return make


ODD = ["a[1].jsonl", "[a]/b.jsonl", "*.jsonl", "a?.jsonl", "two  words .jsonl", "~.jsonl", "~/a.jsonl", "a\\b.jsonl"]


@pytest.mark.parametrize("name", [*ODD, "a::b.jsonl", "a#b%20.jsonl"])
def test_a_name_that_is_there_is_meant_literally(folder: Callable[..., Path], name: str) -> None:
    made = folder(name, "a1.jsonl", "a/b.jsonl")
    assert named(made, name) == [name]
    assert named(made, str(made / name)) == [name]


def test_what_is_not_there_is_a_pattern(folder: Callable[..., Path]) -> None:
    made = folder("[x]/a1.jsonl", "[x]/a2.jsonl", "[x]/b.txt", "x/a3.jsonl", "y/z/a4.jsonl", ".hidden.jsonl")
    assert named(made, "[x]/a[12].jsonl") == ["[x]/a1.jsonl", "[x]/a2.jsonl"]
    assert named(made, "[xy]/*.jsonl", "[x]/*") == ["x/a3.jsonl", "[x]/a1.jsonl", "[x]/a2.jsonl", "[x]/b.txt"]
    assert named(made, "**/*.jsonl") == ["[x]/a1.jsonl", "[x]/a2.jsonl", "x/a3.jsonl", "y/z/a4.jsonl"]
    assert named(made, "y/**") == ["y/z/a4.jsonl"]
    assert named(made, "*/z/a?.jsonl", "[!x]/z/*") == ["y/z/a4.jsonl"]


def test_a_pattern_passes_over_what_is_hidden_unless_the_dot_is_written(folder: Callable[..., Path]) -> None:
    made = folder("a/b.jsonl", "a/._b.jsonl", "a/.DS_Store.jsonl", ".git/c.jsonl", ".x/.y/d.jsonl")
    for pattern in ("**/*.jsonl", "**", "*/*", "a/?*"):
        assert named(made, pattern) == ["a/b.jsonl"], pattern
    assert named(made, "a/.*.jsonl") == ["a/.DS_Store.jsonl", "a/._b.jsonl"] and named(made, "a/._b.jsonl") == [
        "a/._b.jsonl"
    ]
    assert named(made, ".g*/*") == [".git/c.jsonl"] and named(made, ".x/.y/*") == [".x/.y/d.jsonl"]


def test_hidden_files_of_buckets_and_of_the_hub_are_asked_for_by_their_dot() -> None:
    assert shown("b/a/x.jsonl", "b/**/*.jsonl") and not shown("b/a/._x.jsonl", "b/**/*.jsonl")
    assert not shown(".git/x", "**") and shown(".git/x", ".g*/*") and not shown(".git/.x", ".git/*")


@pytest.mark.parametrize("written", [NFC, NFD])
@pytest.mark.parametrize("asked", [NFC, NFD])
def test_names_are_compared_as_characters(folder: Callable[..., Path], written: str, asked: str) -> None:
    made = folder(f"{written}/{written}.jsonl", f"{written}/{written}?.jsonl")
    assert named(made, f"{asked}/{asked}.jsonl") == [f"{written}/{written}.jsonl"]
    assert named(made, f"{asked}/*é.jsonl") == [f"{written}/{written}.jsonl"]
    both = sorted(f"{written}/{written}{last}.jsonl" for last in ("", "?"))
    assert named(made, f"*/{asked.split()[0]}*.jsonl") == both


def test_both_spellings_side_by_side_are_two_files(folder: Callable[..., Path]) -> None:
    made = folder(f"{NFC}.jsonl", f"{NFD}.jsonl")
    assert named(made, f"{NFC}.jsonl") == [f"{NFC}.jsonl"] and named(made, f"{NFD}.jsonl") == [f"{NFD}.jsonl"]
    assert named(made, "*.jsonl") == sorted([f"{NFC}.jsonl", f"{NFD}.jsonl"])


def test_links_are_followed_and_lead_nowhere_twice(folder: Callable[..., Path]) -> None:
    made = folder("real/a.jsonl")
    (made / "link").symlink_to("real")
    (made / "b.jsonl").symlink_to("real/a.jsonl")
    (made / "real" / "back").symlink_to("..")
    assert named(made, "link/*.jsonl") == named(made, "l*/a.jsonl") == ["link/a.jsonl"]
    assert named(made, "**/*.jsonl") == ["b.jsonl", "real/a.jsonl"]
    (made / "gone.jsonl").symlink_to("nowhere/x.jsonl")
    with pytest.raises(DataError, match=r"gone.jsonl: a link to nowhere/x.jsonl \(No such file or directory\); fix"):
        named(made, "*.jsonl")


def test_a_home_is_meant_where_nothing_is_called_so(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = folder("home/a.jsonl", "here/b.jsonl")
    monkeypatch.setenv("HOME", str(made / "home"))
    assert find_local("~/a.jsonl", str(made / "here"))[0] == [str(made / "home" / "a.jsonl")]
    assert named(made, f"file://{made}/home/a.jsonl") == ["home/a.jsonl"]


def test_what_was_tried_is_printed_whole(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, make_job: Callable[..., JobSpec]
) -> None:
    made = folder("here/texts/a.jsonl", "there/b.jsonl")
    monkeypatch.chdir(made / "here")
    job = make_job({"web": from_files("texts/a.jsonl")}, made / "data")
    elsewhere = job.updated({"storage": {"sources_dir": str(made / "there")}})
    assert elsewhere.stage_dir("raw") == job.stage_dir("raw") and elsewhere.run_name == job.run_name
    assert raw_texts(run(elsewhere).path) == ["One.", "Two."]  # as before there were such folders
    (made / "there/texts").mkdir()
    (made / "there/texts/a.jsonl").write_bytes(b'{"text": "There."}\n')
    assert raw_texts(run(elsewhere).path) == ["There."]
    (made / "there/texts/a.jsonl").unlink()
    (made / "here/texts/a.jsonl").unlink()
    assert f"{made}/there/texts/a.jsonl was tried (globs" in refused(elsewhere)
    windows = make_job({"web": from_files(r"texts\b.jsonl")}, made / "data")
    assert r"texts\b.jsonl was tried (folders are separated by /: texts/b.jsonl)" in refused(windows)


def test_what_is_no_ordinary_file_is_not_waited_for(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl: not a regular file" in refused(make_job({"web": from_files(tmp_path / "pipe.jsonl")}, tmp_path))


def test_a_path_on_the_hub_is_meant_as_one_in_a_folder_is() -> None:
    paths = ["data/a[1].jsonl", "data/a1.jsonl", f"data/{NFD}.jsonl", "data/a?.jsonl"]
    assert hub._matching("data/a[1].jsonl", paths) == ["data/a[1].jsonl"]
    assert hub._matching("data/a?.jsonl", paths) == ["data/a?.jsonl"]
    assert hub._matching("data/a[0-9].jsonl", paths) == ["data/a1.jsonl"]
    assert hub._matching(f"data/{NFC}.jsonl", paths) == hub._matching("*é.jsonl", paths) == [f"data/{NFD}.jsonl"]

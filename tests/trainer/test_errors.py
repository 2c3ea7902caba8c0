"""Every foreseen error has one row in the table of exit codes; all others are bugs."""

from __future__ import annotations

import errno
import importlib
import io
import pickle
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import components
import manifests
import pipelines
from components.running import told
from components.volume import named
from trainer import errors
from trainer.data.manifest import MANIFEST_NAME, read_manifest
from trainer.data.provenance import Origins
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, ForeseenError, LaunchError, VolumeError, foreseen, in_words, of_the_machine
from trainer.exitcodes import MEANING, ExitCode, retryable
from trainer.kinds.ngrams import token_classes
from trainer.process import failures

SIGNALS = {ExitCode.INTERRUPTED, ExitCode.TERMINATED, ExitCode.KILLED, ExitCode.CRASHED}
NO_ERROR = {ExitCode.OK, ExitCode.UNEXPECTED, ExitCode.FAULT, ExitCode.HANG} | SIGNALS


def subclasses(of: type[ForeseenError]) -> set[type[ForeseenError]]:
    return {of}.union(*(subclasses(each) for each in of.__subclasses__())) if of.__subclasses__() else {of}


def all_errors() -> list[type[ForeseenError]]:
    """Of every module that can define one."""
    for package in (components, manifests, pipelines):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.startswith(("components.download.sample", "pipelines.compile")):
                importlib.import_module(found.name)
    return sorted(subclasses(ForeseenError) - {ForeseenError}, key=lambda each: each.__qualname__)


def test_every_error_class_ends_in_a_code_of_the_table_and_every_code_has_its_class():
    found = all_errors()
    own = {each for each in found if each.__module__ == errors.__name__}
    codes = {each: ExitCode(each.code) for each in own}
    assert len(set(codes.values())) == len(own), "one class for a code"
    assert set(codes.values()) == set(ExitCode) - NO_ERROR
    for each in found:
        if "code" in vars(each) or each in own:
            assert isinstance(each.code, int) and each.code in MEANING, each
        else:  # a finer class ends as the one that it refines
            assert any(issubclass(each, known) for known in own) or each.__name__ == "Stopped", each


@pytest.mark.parametrize("made", sorted(errors.ForeseenError.__subclasses__(), key=lambda each: each.__name__))
def test_an_error_ends_alike_in_a_rank_a_step_and_the_command_line(made: type[ForeseenError], monkeypatch):
    monkeypatch.delenv("YAONGI_VERBOSE", raising=False)
    if made.__module__ != errors.__name__:
        pytest.skip("needs other arguments")
    error, said = made("what, where; fix it so"), io.StringIO()
    assert failures.classify(error) == told(error, said) == (made.code, "what, where; fix it so")
    assert said.getvalue() == "", "a foreseen error shows no traceback"
    assert str(pickle.loads(pickle.dumps(error))) == str(error), "ranks send it to each other"


@pytest.mark.parametrize(
    "error", [ValueError("invalid literal"), KeyError("x"), FileNotFoundError(errno.ENOENT, "no", "x"), TypeError()]
)
def test_any_other_error_is_a_fault_with_its_traceback(error: Exception, capsys):
    said = io.StringIO()
    code, message = told(error, said)
    assert (code, failures.classify(error)[0]) == (ExitCode.FAULT, ExitCode.FAULT) and not retryable(code)
    assert message.startswith(type(error).__name__) and type(error).__name__ in said.getvalue()
    failures.show(error, *failures.classify(error))
    assert type(error).__name__ in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE]
)
def test_what_the_machine_refuses_is_named_with_its_path_and_no_number(number: int):
    found = of_the_machine(OSError(number, "as the system says", "/data/x"))
    assert isinstance(found, VolumeError) and str(found).startswith("/data/x: ") and "; " in str(found)
    assert "Errno" not in str(found) and f" {number}" not in str(found)
    assert str(of_the_machine(OSError(number, "said"), "/data")).startswith("/data: ")
    assert foreseen(OSError(errno.ENOENT, "no such file", "x")) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(-2, "Name or service not known"), "Name or service not known"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (
            RuntimeError("<urllib3.HTTPConnection object at 0x7f0a>: Failed: [Errno 111] Refused.\nmore"),
            "Failed: Refused",
        ),
        (Exception("Permission denied (os error 13)"), "Permission denied"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_systems_error_is_told_in_words(error: Exception, words: str):
    assert in_words(error) == words


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (MANIFEST_NAME, read_manifest),
        ("tokenizer.json", Tokenizer.load),
        ("tokenizer.json", lambda place: token_classes(place / "tokenizer.json")),
        ("a.docs", lambda place: Origins(place / "a", 1)),
    ],
)
def test_data_that_the_volume_does_not_give_is_no_bad_data(name: str, read: Callable[[Path], object], tmp_path: Path):
    with pytest.raises(DataError) as missing:
        read(tmp_path)
    (tmp_path / name).mkdir()  # which no one, not even root, can read as a file
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(Is a directory\); check the volume") as unreadable:
        read(tmp_path)
    assert (missing.value.code, unreadable.value.code) == (ExitCode.DATA, ExitCode.VOLUME)


def test_the_documented_table_is_the_programs():
    page = Path(__file__).parents[2] / "docs" / "exit-codes.md"
    rows = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if re.match(r"\| \d", line)]
    documented = {int(row[0].strip("| ")): row[1] for row in rows}
    assert list(documented) == [int(code) for code in ExitCode]
    for code in set(ExitCode) - {ExitCode.UNEXPECTED}:
        assert documented[code].startswith(MEANING[code].partition("; the traceback")[0])


def test_what_is_named_in_front_of_an_error_leaves_it_as_it_is():
    given = LaunchError("it does not answer", ExitCode.VOLUME)
    with pytest.raises(LaunchError, match=r"^source 'x': it does not answer$") as error, named("source 'x'"):
        raise given
    assert error.value.code == ExitCode.VOLUME

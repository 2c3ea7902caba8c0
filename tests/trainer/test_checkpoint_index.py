"""A checkpoint's index is pickled: every supported Python reads those of all others, and other content is refused."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from trainer.checkpoints.index import ForeignUnpickler, IndexUnpickler
from trainer.errors import ForeseenError


class AsOldPython:
    """Pickles as Python before 3.11.4 pickled the member of an enum: getattr, its class and its name."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (self.of, self.name)


def load(value: Any, tmp_path) -> Any:
    path = tmp_path / "index"
    path.write_bytes(pickle.dumps(value))
    with path.open("rb") as stream:
        return IndexUnpickler(stream).load()


@pytest.mark.parametrize("member", list(_MEM_FORMAT_ENCODING))
def test_an_index_of_an_older_python_is_read(member: _MEM_FORMAT_ENCODING, tmp_path) -> None:
    assert load(AsOldPython(_MEM_FORMAT_ENCODING, member.name), tmp_path) is member
    assert load(member, tmp_path) is member


@pytest.mark.parametrize(
    "evil", [AsOldPython(_MEM_FORMAT_ENCODING, "__init_subclass__"), AsOldPython(str, "upper"), print, eval]
)
def test_anything_else_is_refused(evil: Any, tmp_path) -> None:
    with pytest.raises(ForeseenError, match="which no index contains"):
        load(evil, tmp_path)


@pytest.mark.parametrize("evil", [AsOldPython(str, "upper"), print, eval])
def test_nothing_in_the_index_of_another_program_runs(evil: Any, tmp_path) -> None:
    path = tmp_path / "index"
    path.write_bytes(pickle.dumps([evil, Runs(tmp_path / "ran"), ValueError("x")]))
    with path.open("rb") as stream:
        inert = ForeignUnpickler(stream).load()
    assert not (tmp_path / "ran").exists()
    assert {getattr(each, "__name__", type(each).__name__) for each in inert} == {"_Inert"}


class Runs:
    """Makes a folder where it is unpickled by pickle itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)

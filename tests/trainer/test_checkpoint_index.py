"""A checkpoint's index is pickled: every supported Python reads those of all others, and other content is refused."""

import pickle
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from trainer.checkpoints.checkpointer import _IndexUnpickler
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
        return _IndexUnpickler(stream).load()


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

"""A directory that appears when it is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import VolumeError
from trainer.files import new_directory


def test_a_new_directory_replaces_the_old_one_or_leaves_it(tmp_path: Path):
    """Leftovers of killed processes go, those of a directory with a longer name stay."""
    for name in (".[e]-unfinished-17", ".[e]-old-17", ".[e]-int8-unfinished-17"):
        (tmp_path / name).mkdir()
    final = tmp_path / "[e]"
    for text in ("first", "second"):
        with new_directory(final) as draft:
            (draft / "file").write_text(text)
        assert (final / "file").read_text() == text
    with pytest.raises(ZeroDivisionError), new_directory(final) as draft:
        (draft / "file").write_text(str(1 / 0))
    assert (final / "file").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".[e]-int8-unfinished-17", "[e]"]
    with pytest.raises(VolumeError, match="cannot be created"), new_directory(final / "file" / "below"):
        pass

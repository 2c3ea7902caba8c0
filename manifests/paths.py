"""How a path given by the user is stored and shown."""

from __future__ import annotations

from pathlib import Path


def whole(path: str | Path) -> Path:
    """The absolute path without `..`; each `..` is the parent of the resolved folder. Other symlinks are kept."""
    absolute = Path(path).absolute()
    return absolute.resolve() if ".." in absolute.parts else absolute

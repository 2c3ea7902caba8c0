"""How a path that a person has given is written down and shown."""

from __future__ import annotations

from pathlib import Path


def whole(path: str | Path) -> Path:
    """The absolute path without `..`, each of which is the folder above what is really there. Links elsewhere stay."""
    absolute = Path(path).absolute()
    return absolute.resolve() if ".." in absolute.parts else absolute

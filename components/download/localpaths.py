"""Find the local files that a path or pattern means.

An existing name is used literally, including brackets; otherwise it is a pattern of `*`, `?`, `[…]` and `**` (any
folders). As in a shell, names that begin with a dot (.DS_Store, ._a.jsonl) match only if the pattern's part does too.
Names are compared after Unicode composition: macOS and some archives write 한글 in other bytes than people type.
"""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import partial

from trainer.errors import VolumeError

MAGIC = re.compile(r"[*?[]")


def find_local(pattern: str, folder: str | None) -> tuple[list[str], bool, str]:
    """Returns (absolute paths in order, whether it is one path named literally, the absolute path that was searched).

    Relative paths start in `folder`, by default the working directory; `~` is the home directory unless such a name
    exists.

    Raises:
        VolumeError: a folder on the path cannot be read.
    """
    wanted = os.path.abspath(os.path.join(folder or "", pattern))
    if pattern.startswith("~") and not os.path.lexists(os.path.join(folder or "", pattern.split("/")[0])):
        wanted = os.path.abspath(os.path.expanduser(pattern))
    try:
        found = set(_below("/", wanted.split("/")[1:]))
    except OSError as error:
        raise VolumeError(
            f"{pattern}: {error.filename}: {error.strerror}; check the path and its permissions"
        ) from None
    one = next(iter(found)) if len(found) == 1 else ""
    return sorted(found), composed(one) == composed(wanted), wanted


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def compare(pattern: str) -> re.Pattern[str]:
    """A pattern for one name, to be matched with a `composed` name."""
    return re.compile(fnmatch.translate(composed(pattern)))


def shown(path: str, pattern: str) -> bool:
    """Whether no part of a matching path is hidden, except where the pattern's part begins with a dot too."""
    asked = [compare(part) for part in pattern.split("/") if part.startswith(".")]
    hidden = (part for part in composed(path).split("/") if part.startswith("."))
    return all(any(one.match(part) for one in asked) for part in hidden)


def _below(folder: str, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield folder
        return
    part, rest, into = parts[0], parts[1:], partial(os.path.join, folder)
    if os.path.lexists(into(part)):
        yield from _below(into(part), rest)
        return
    if not os.path.isdir(folder):
        return
    names = os.listdir(folder)
    if same := [name for name in names if composed(name) == composed(part)]:
        names = same
    elif part == "**":
        yield from _below(folder, rest or ["*"])
        for name in names:
            # A symlink may lead back here.
            if shown(name, "") and os.path.isdir(into(name)) and not os.path.islink(into(name)):
                yield from _below(into(name), parts)
        return
    elif MAGIC.search(part):
        names = [name for name in names if compare(part).match(composed(name)) and shown(name, part)]
    else:
        return
    for name in names:
        if not rest or os.path.isdir(into(name)):
            yield from _below(into(name), rest)

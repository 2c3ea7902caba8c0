"""A mixed corpus of any size for benchmarks, generated and reproducible on one machine; it is not in the repository.

It recombines the paragraphs of the sample corpus that ships with yaongi (ko, en, code, math) and adds Python sources of
the standard library and the installed packages.
"""

from __future__ import annotations

import gzip
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "components" / "download" / "sample"
DOMAINS = ("ko", "en", "code", "math")


def write_corpus(path: Path, num_bytes: int, seed: int = 0) -> int:
    """Write JSON lines with at least `num_bytes` bytes of text; returns the number of bytes."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in _texts(seed):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= num_bytes:
                return written
    raise AssertionError("the corpus never ends")


def _texts(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    paragraphs = {name: _paragraphs(name) for name in DOMAINS}
    sources = _sources()
    while True:
        for name, some in paragraphs.items():
            yield "\n\n".join(rng.choices(some, k=rng.randint(1, 24)))
            if name == "code":
                path = sources[rng.randrange(len(sources))]
                yield path.read_text(encoding="utf-8", errors="ignore")


def _paragraphs(name: str) -> list[str]:
    with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [part for line in lines for part in json.loads(line)["text"].split("\n\n") if part.strip()]


def _sources() -> list[Path]:
    """Python files of 2 to 60 kB."""
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    found = {path for root in roots for path in Path(root).rglob("*.py")}
    return sorted(path for path in found if 2_000 <= path.stat().st_size <= 60_000)

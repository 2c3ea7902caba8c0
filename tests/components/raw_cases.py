"""A small raw stage of the tiny preset's sources, and jobs that work on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from manifests.spec import JobSpec, job_from
from trainer.data.manifest import Manifest, SourceEntry, StageResult, file_entry, write_manifest

WORDS = {
    "ko": ["대한민국의", "수도는", "서울이다.", "고양이가", "야옹", "하고", "운다.\n", "모델을", "훈련한다."],
    "en": ["The", "capital", "of", "Korea", "is", "Seoul.\n\n", "A", "cat", "says", "meow."],
    "code": ["def", "f(x):\n    return", "x", "+", "1\n", "import", "os\n", "#", "=", "[0]"],
    "math": ["12", "×", "7", "=", "84.\n", "Question:", "What", "is", "√2?", "1024"],
}


def small_job(directory: Path, changes: dict[str, Any] | None = None) -> JobSpec:
    base: dict[str, Any] = {
        "preset": "tiny",
        "data": {"heldout_fraction": 0.1},
        "tokenizer": {"vocab_size": 640},
        "train": {"model": {"vocab_size": 640}},
        "shards": {"unit_bytes": 4096, "max_shard_bytes": 65536, "workers": 1},
        "storage": {"datasets_dir": str(directory), "checkpoints_dir": str(directory / "checkpoints")},
    }
    return job_from(base, changes)


def texts(source: str, count: int) -> list[str]:
    rng = random.Random(source)
    made = [" ".join(rng.choices(WORDS[source], k=rng.randint(1, 60))) for _ in range(count)]
    return ["", *made, made[0]]


def write_raw(job: JobSpec, documents: int = 150, extra: dict[str, list[str]] | None = None) -> StageResult:
    """Two files for each source, which also holds its `extra` texts."""
    directory = Path(job.stage_dir("raw"))
    files = []
    for source in job.data.sources:
        (directory / source).mkdir(parents=True, exist_ok=True)
        for part in range(2):
            some = [*texts(source, documents), *(extra or {}).get(source, [])][part::2]
            name = f"{source}/part-{part:05d}.jsonl"
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some]
            (directory / name).write_text("".join(lines), encoding="utf-8")
            size = sum(len(text.encode()) for text in some)
            counts = {"documents": len(some), "text_bytes": size}
            files.append(file_entry(directory, name, "sha256", source=source, **counts))
    sources = {
        name: SourceEntry(domain=source.domain, licence=source.licence, origin="made", revision="1")
        for name, source in job.data.sources.items()
    }
    manifest = Manifest(kind="raw", sources=sources, files=files)
    write_manifest(directory, manifest)
    return StageResult(kind="raw", path=str(directory), digest=manifest.digest)


def contents(directory: str | Path) -> dict[str, bytes]:
    """Every file in a directory and its subdirectories."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}

"""Peak memory and speed of the download and hygiene steps on a generated corpus: does memory grow with its size?

The corpus repeats the sample texts with shuffled words, as one Parquet file with one row group (the worst case) and one
gzipped JSON-lines file; a tenth of the documents are copies. Each step runs in a separate process.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer

import components
from manifests.spec import JobSpec, job_from, job_from_json
from trainer.data.manifest import StageResult

SAMPLE = Path(components.__file__).parent / "download" / "sample"


def main(megabytes: Annotated[int, typer.Option(help="Size of the corpus.")] = 1000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.json").write_text(_job(Path(folder)).model_dump_json())
        # In a separate process: a child's peak includes what its parent held when it started.
        subprocess.run([sys.executable, __file__, "make", folder, str(megabytes * 10**6)], check=True)
        for step in ("download", "hygiene"):
            started = time.monotonic()
            child = subprocess.Popen([sys.executable, __file__, step, folder], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise SystemExit(f"{step} failed")
            peak, cpu, wall = usage.ru_maxrss / 2**20, usage.ru_utime + usage.ru_stime, time.monotonic() - started
            print(f"{step}: peak {peak:.2f} GiB, {megabytes / cpu:.1f} MB a second of CPU, {wall:.0f} s", flush=True)


def _job(folder: Path) -> JobSpec:
    shared = {"domain": "en", "licence": "CC0-1.0", "weight": 0.5}
    names = {"packed": "a.parquet", "lines": "b.jsonl.gz"}
    sources = {
        name: shared | {"origin": {"kind": "files", "paths": [str(folder / file)]}} for name, file in names.items()
    }
    exam = {"origin": {"kind": "files", "paths": ["sample://en.jsonl.gz"]}}
    changes = {
        "data": {"sources": {**dict.fromkeys(("ko", "en", "code", "math")), **sources}},
        "hygiene": {"exact_duplicates": True, "evaluation": {"exam": exam}},
        "shards": {"workers": 1},
        "storage": {"datasets_dir": str(folder / "data")},
    }
    return job_from({"preset": "tiny"}, changes)


def _make(folder: Path, size: int) -> None:
    rng = random.Random(0)
    packed = [(SAMPLE / f"{name}.jsonl.gz").read_bytes() for name in ("ko", "en", "code")]
    texts = [json.loads(line)["text"] for data in packed for line in gzip.decompress(data).splitlines()]
    made, total = list[str](), 0
    while total < size // 2:
        words = rng.choice(texts).split(" ")
        rng.shuffle(words)
        made.append(made[-1] if made and rng.random() < 0.1 else " ".join(words))
        total += len(made[-1].encode())
    pq.write_table(pa.table({"text": made}), folder / "a.parquet", row_group_size=len(made))
    with gzip.open(folder / "b.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": text + " ."}) + "\n" for text in made)


def _step(name: str, folder: str) -> None:
    from components.download import step as download
    from components.hygiene import step as hygiene

    job = job_from_json((Path(folder) / "job.json").read_text())
    kept = Path(folder) / "raw.json"
    if name == "download":
        kept.write_text(download.run(job).to_json())
    else:
        hygiene.run(job, StageResult.from_json(kept.read_text()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        _make(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] in (["download"], ["hygiene"]):
        _step(*sys.argv[1:])
    else:
        typer.run(main)

"""Tokenisation into token files: ours against Megatron's approach and datatrove, with the same tokenizer.

    python benchmarks/data.py --peers .venv-peers/bin/python     # `make test-peers` builds that environment
    python benchmarks/data.py --megabytes 1000 --repeats 1       # without peers: only our memory and speed

They run in turn on the same corpus, each in a separate process; imports are not counted. MB are 10⁶ bytes of UTF-8
text. CPU seconds are summed over all processes: on a busy machine their ratio is more reliable than that of wall times.
Megatron's approach is that of its tools/preprocess_data.py: a pool encodes the lines of one file (`imap` in chunks of
32) and one process writes; here `tokenizers` is called directly. datatrove runs MegatronDocumentTokenizer, one task per
core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

VOCAB_SIZE = 32768
FILES = ("part-00000.jsonl", "part-00001.jsonl")


def ours(work: Path, cores: int) -> Callable[[], object]:
    from components.shards.step import run

    job, raw, tokenizer = _stages(work, cores)
    shutil.rmtree(job.stage_dir("shards"), ignore_errors=True)
    return lambda: run(job, raw, tokenizer)


def train(work: Path, cores: int) -> Callable[[], object]:
    """Train the tokenizer as the tokenizer step does."""
    from components.tokenizer.step import run

    job, raw, _ = _stages(work, cores, trained=False)
    shutil.rmtree(job.stage_dir("tokenizers"), ignore_errors=True)
    return lambda: run(job, raw)


def _stages(work: Path, cores: int, trained: bool = True):
    from manifests.spec import job_from
    from trainer.data.manifest import Manifest, SourceEntry, StageResult, file_entry, read_manifest, write_manifest

    source = {"domain": "ko", "weight": 1.0, "licence": "mixed", "origin": {"kind": "files", "paths": ["mixed"]}}
    changes = {
        "data": {"sources": {"mixed": source, "ko": None, "en": None, "code": None, "math": None}},
        "tokenizer": {"vocab_size": VOCAB_SIZE},
        "train": {"model": {"vocab_size": VOCAB_SIZE}},
        "shards": {"workers": cores, "unit_bytes": 2**24, "max_shard_bytes": 2**30},
        "storage": {"datasets_dir": str(work / "datasets")},
    }
    job = job_from({"preset": "tiny"}, changes)
    directory = Path(job.stage_dir("raw"))
    if not (directory / "manifest.json").exists():
        (directory / "mixed").mkdir(parents=True)
        entries = []
        for name in FILES:
            os.link(work / "corpus" / name, directory / "mixed" / name)
            texts = [json.loads(line)["text"] for line in open(work / "corpus" / name, encoding="utf-8")]  # noqa: SIM115
            counts = {"documents": len(texts), "text_bytes": sum(len(text.encode()) for text in texts)}
            entries.append(file_entry(directory, f"mixed/{name}", source="mixed", **counts))
        origin = SourceEntry(domain="ko", licence="mixed", origin="benchmarks/corpus.py", revision="1")
        write_manifest(directory, Manifest(kind="raw", sources={"mixed": origin}, files=entries))

    def stage(kind: str, path: str) -> StageResult:
        return StageResult(kind=kind, path=path, digest=read_manifest(path).digest)

    raw = stage("raw", str(directory))
    return job, raw, stage("tokenizer", job.stage_dir("tokenizers")) if trained else None


class _Encoder:
    """What Megatron's workers do with a line: parse it, encode it, append the end of the document."""

    def __init__(self, tokenizer: str) -> None:
        self.path = tokenizer

    def start(self) -> None:
        from tokenizers import Tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _Encoder.tokenizer = Tokenizer.from_file(self.path)
        _Encoder.tokenizer.encode_special_tokens = True

    def encode(self, line: str) -> list[int]:
        return [*_Encoder.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, 0]


def megatron(work: Path, cores: int) -> Callable[[], object]:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    def preprocess() -> None:
        encoder = _Encoder(_tokenizer(work))
        builder = IndexedDatasetBuilder(str(work / "megatron.bin"), dtype=DType.optimal_dtype(VOCAB_SIZE))
        with multiprocessing.Pool(cores, initializer=encoder.start) as pool:
            for name in FILES:
                with open(work / "corpus" / name, encoding="utf-8") as lines:
                    for ids in pool.imap(encoder.encode, lines, 32):
                        builder.add_document(ids, [len(ids)])
            pool.close()
            pool.join()
        builder.finalize(str(work / "megatron.idx"))

    return preprocess


def datatrove(work: Path, cores: int) -> Callable[[], object]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer
    from datatrove.utils import logging

    logging.logger.remove()
    shutil.rmtree(work / "datatrove", ignore_errors=True)
    shutil.rmtree(work / "datatrove-logs", ignore_errors=True)
    reader = JsonlReader(str(work / "corpus"), doc_progress=False)
    writer = MegatronDocumentTokenizer(
        str(work / "datatrove"), tokenizer_name_or_path=_tokenizer(work), eos_token="<|endoftext|>"
    )
    logs = str(work / "datatrove-logs")
    # Forked, so that the CPU time of its workers counts as that of child processes.
    steps = [reader, writer]
    return LocalPipelineExecutor(steps, tasks=len(FILES), workers=cores, logging_dir=logs, start_method="fork").run


def _tokenizer(work: Path) -> str:
    return str(next((work / "datasets" / "tokenizers").glob("*/tokenizer.json")))


RUNS = {"train": train, "ours": ours, "megatron": megatron, "datatrove": datatrove}


def measured(name: str, work: Path, cores: int) -> dict[str, float]:
    """Run one method in this process."""
    call = RUNS[name](work, cores)
    before, start = os.times(), time.perf_counter()
    call()
    seconds, after = time.perf_counter() - start, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak / 1024}


def in_a_process(name: str, python: str, arguments: argparse.Namespace, work: Path) -> dict[str, float]:
    command = [python, __file__, "--run", name, "--work", str(work), "--cores", str(arguments.cores)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, work: Path) -> None:
    from corpus import write_corpus

    (work / "corpus").mkdir()
    halves = [write_corpus(work / "corpus" / n, arguments.megabytes * 10**6 // 2, seed=s) for s, n in enumerate(FILES)]
    megabytes = sum(halves) / 1e6
    found = in_a_process("train", sys.executable, arguments, work)
    sampled = min(megabytes, 200.0)
    print(f"corpus {megabytes:.0f} MB, tokenizer of {VOCAB_SIZE} ids, {arguments.cores} cores")
    print(f"training the tokenizer on {sampled:.0f} MB: {sampled / found['seconds']:.1f} MB/s", end="")
    print(f", {found['cpu_seconds']:.0f} s CPU, peak {found['peak_mib']:.0f} MiB")
    python = {"ours": sys.executable}
    if arguments.peers:
        python |= {"megatron": arguments.peers, "datatrove": arguments.peers}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in python}
    for _ in range(arguments.repeats):
        for name, interpreter in python.items():
            results[name].append(in_a_process(name, interpreter, arguments, work))
    middle = {
        name: {key: statistics.median(one[key] for one in some) for key in some[0]} for name, some in results.items()
    }
    print(f"{'':10}{'MB/s':>8}{'MB per CPU s':>14}{'peak MiB of a process':>23}{'ours faster':>13}{'by CPU':>8}")
    for name, one in middle.items():
        ratios = [one[key] / middle["ours"][key] for key in ("seconds", "cpu_seconds")]
        speeds = f"{megabytes / one['seconds']:8.2f}{megabytes / one['cpu_seconds']:14.2f}{one['peak_mib']:23.0f}"
        print(f"{name:10}{speeds}{ratios[0]:12.2f}×{ratios[1]:7.2f}×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--peers", help="python of an environment with megatron-core and datatrove")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print("\n" + json.dumps(measured(arguments.run, arguments.work, arguments.cores)))
        return
    with tempfile.TemporaryDirectory(prefix="yaongi-data-") as work:
        compare(arguments, Path(work))


if __name__ == "__main__":
    main()

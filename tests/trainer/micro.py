"""A model and a corpus so small that a run of several processes takes seconds: for tests of the runtime."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from trainer.data import tokenizer as tokenizers
from trainer.data.answers import write_answers
from trainer.data.format import ShardWriter, token_dtype
from trainer.data.manifest import Manifest, SourceEntry, file_entry, write_manifest
from trainer.spec import TrainSpec
from trainer.specbase import deep_merge, parse, to_yaml

VOCAB = 320
TOKENS_PER_STEP = 256
FAULTY = str(Path(__file__).with_name("faulty_rank.py"))
WORDS = ["river", "stone", "다리", "moon", "강물", "light", "seven", "def", "return", "x", "바람", "12"]


def make_data(
    directory: Path, seed: int = 7, answers: dict[str, int] | None = None, own: dict[str, list[str]] | None = None
) -> None:
    """`directory/{tokenizer,shards}`: two sources of random sentences.

    Args:
        own: other texts of one of them, 150.
        answers: sources whose documents are trained only on random ranges, with their maximum number per document.
    """
    rng = random.Random(seed)
    texts = {
        source: [" ".join(rng.choices(WORDS, k=rng.randrange(5, 60))) for _ in range(150)] for source in ("ko", "en")
    } | (own or {})
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "shards").mkdir()
    raw = tokenizers.train((text for part in texts.values() for text in part), VOCAB)
    tokenizers.save(raw, directory / "tokenizer")
    files = [file_entry(directory / "tokenizer", "tokenizer.json")]
    manifest = Manifest(kind="tokenizer", files=files)
    write_manifest(directory / "tokenizer", manifest)
    tokenizer = tokenizers.Tokenizer.load(directory / "tokenizer")
    entries = []
    for source, documents in texts.items():
        for split, part in (("train", documents[:140]), ("heldout", documents[140:])):
            name = f"{source}-{split}"
            ids = [[*tokenizer.encode(text), 0] for text in part]
            with ShardWriter(directory / "shards" / name, token_dtype(VOCAB)) as writer:
                for document in ids:
                    writer.append(np.array(document, writer.dtype), np.array([len(document)]))
            counts = {"source": source, "split": split, "documents": len(part), "tokens": sum(map(len, ids))}
            entries.append(file_entry(directory / "shards", f"{name}.bin", **counts))
            entries.append(file_entry(directory / "shards", f"{name}.idx", source=source, split=split))
            if source in (answers or {}):
                ranges = [random_ranges(rng, len(document), (answers or {})[source]) for document in ids]
                flat = np.array([pair for some in ranges for pair in some], np.uint32).reshape(-1, 2)
                write_answers(directory / "shards" / name, np.array([len(some) for some in ranges]), flat)
                entries.append(file_entry(directory / "shards", f"{name}.answers", source=source, split=split))
    sources = {s: SourceEntry(domain="en", licence="CC0-1.0", origin="random words", revision="1") for s in texts}
    inputs = {"tokenizer": manifest.digest}
    write_manifest(directory / "shards", Manifest(kind="shards", inputs=inputs, sources=sources, files=entries))


def random_ranges(rng: random.Random, length: int, most: int) -> list[list[int]]:
    """At most `most` ranges [start, stop) of a document's tokens, in order."""
    bounds = sorted(rng.sample(range(length), 2 * min(rng.randint(0, most), length // 2)))
    return [bounds[n : n + 2] for n in range(0, len(bounds), 2)]


def micro_spec(data: Path, run_dir: Path, **changes: Any) -> TrainSpec:
    """Every kind of layer, 8 rows of 32 tokens a step."""
    base = {
        "run": "micro",
        "run_dir": str(run_dir),
        "steps": 12,
        "model": {
            "vocab_size": VOCAB,
            "hidden": 32,
            "layers": ["ME", "N", "*-"],
            "mamba": {"num_heads": 2, "head_dim": 16, "d_state": 16, "chunk_size": 16},
            "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
            "moe": {"num_experts": 4, "top_k": 2, "expert_width": 32},
            "mlp": {"width": 32},
            "engram": [{"layer": 1, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2}],
        },
        "tokens": {
            "shards": str(data / "shards"),
            "tokenizer": str(data / "tokenizer"),
            "mix": {"ko": {"weight": 0.5, "max_epochs": 50}, "en": {"weight": 0.5, "max_epochs": 50}},
            "seq_len": 32,
        },
        "batch": {"tokens_per_step": TOKENS_PER_STEP, "micro_batch_rows": 2},
        "checkpoint": {"every_steps": 4},
        "runtime": {"metrics_port": 0, "log_every_steps": 4, "device": "cpu", "communication_timeout_seconds": 60},
    }
    return parse(TrainSpec, deep_merge(base, changes))


def write_spec(spec: TrainSpec, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(spec), encoding="utf-8")
    return file


def environment(**extra: str) -> dict[str, str]:
    """The environment of child processes: no variables of a surrounding torchrun, one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "TORCHELASTIC", "YAONGI"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def start(
    spec: TrainSpec, *arguments: str, ranks: int = 1, module: str = "trainer.entrypoint", fault: str = ""
) -> subprocess.Popen:
    """Start the entrypoint (or one rank) on a spec, which is written beside the run directory.

    Args:
        fault: how the entrypoint's ranks fail, see faulty_rank.py.
    """
    file = write_spec(spec, Path(spec.run_dir).with_suffix(".yaml"))
    program = [FAULTY] if fault else ["-m", module]
    return subprocess.Popen(
        [sys.executable, *program, *arguments, "--spec", str(file)],
        env=environment(PET_NPROC_PER_NODE=str(ranks), FAULT=fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 400) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def end_rank(code: int = 0) -> NoReturn:
    """End a rank's process without the teardown of torch's threads, as in trainer/__main__.py, for the same reasons."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def metrics(spec: TrainSpec) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, except one that is still being written."""
    *lines, _unfinished = (Path(spec.run_dir) / "logs" / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]

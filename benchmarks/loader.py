"""Our TokenLoader against megatron-core's GPTDataset on the same shards: tokens per second and time to the first batch.

    python benchmarks/loader.py --peer .venv-peers/bin/python

Both return batches of 4 × 4,096 tokens of a mix of three sources, shuffled by a seed, in one process without workers.
GPTDataset runs twice: by default, and with separate documents (`reset_position_ids`), which ours always has. Rounds of
both alternate, and the medians are compared. Then the start is timed with an index of 15 billion tokens (15 million
documents; the token file is sparse), from the beginning and in the middle of an epoch.

The peer's Python needs megatron-core, torch and numpy.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SOURCES = {"ko": 0.4, "en": 0.35, "code": 0.25}
SEQ_LEN, ROWS, STEP_ROWS = 4096, 4, 128
DOCUMENTS = 30_000  # per source, 1,100 tokens on average: about 100 million tokens in total
INDEX_TOKENS, INDEX_DOCUMENTS = 15_000_000_000, 15_000_000
PEER = """
import json, os, sys, tempfile, time, warnings
warnings.filterwarnings("ignore")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

directory, sources, seq_len, rows, steps, step_rows, apart = json.loads(sys.argv[1])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

class Tokenizer:
    eod, pad, vocab_size = 0, -1, 32768
    unique_identifiers = {"class": "benchmark"}

with tempfile.TemporaryDirectory() as cache:
    config = GPTDatasetConfig(
        random_seed=0, sequence_length=seq_len, split="100,0,0", path_to_cache=cache, tokenizer=Tokenizer(),
        blend=([f"{directory}/shards/{name}-train-00000" for name in sources], list(sources.values())),
        reset_position_ids=apart, reset_attention_mask=False, eod_mask_loss=apart, create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    began = time.perf_counter()
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [steps * step_rows, 0, 0], lambda: True, config)
    loader = iter(torch.utils.data.DataLoader(builder.build()[0], batch_size=rows))
    next(loader)
    start = time.perf_counter() - began
    batches = (steps - 1) * step_rows // rows
    began = time.perf_counter()
    for _ in range(batches):
        next(loader)
    seconds = time.perf_counter() - began
print(json.dumps({"start": start, "rate": batches * rows * seq_len / seconds}))
"""


def write_corpus(directory: Path) -> None:
    """Random tokens in documents of log-normal length, each with EOD at the end."""
    from trainer.data.format import ShardWriter

    rng = np.random.default_rng(0)
    written = {}
    for name in SOURCES:
        lengths = rng.lognormal(6.5, 1, DOCUMENTS).astype(np.int64) + 1
        tokens = rng.integers(1, 32_768, int(lengths.sum())).astype(np.uint16)
        tokens[np.cumsum(lengths) - 1] = 0
        with ShardWriter(directory / "shards" / f"{name}-train-00000", np.dtype("<u2")) as writer:
            writer.append(tokens, lengths)
        written[name] = (writer.sequences, writer.tokens)
    write_manifests(directory, written)


def write_index(directory: Path) -> None:
    """A shard of 15 billion tokens whose .bin is a sparse file."""
    from trainer.data.format import CODES, HEADER, MAGIC, VERSION

    rng = np.random.default_rng(0)
    mean = INDEX_TOKENS // INDEX_DOCUMENTS
    lengths = rng.integers(1, 2 * mean, INDEX_DOCUMENTS).astype("<i4")
    tokens = int(lengths.sum(dtype=np.int64))
    ends = np.cumsum(lengths, dtype="<i8") * 2
    prefix = directory / "shards" / "web-train-00000"
    with open(prefix.with_suffix(".idx"), "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype("<u2")], INDEX_DOCUMENTS, INDEX_DOCUMENTS + 1))
        for array in (lengths, np.concatenate([[0], ends[:-1]]), np.arange(INDEX_DOCUMENTS + 1, dtype="<i8")):
            file.write(array.data)
    with open(prefix.with_suffix(".bin"), "wb") as file:
        file.truncate(tokens * 2)
    write_manifests(directory, {"web": (INDEX_DOCUMENTS, tokens)}, checksums=False)


def write_manifests(directory: Path, written: dict[str, tuple[int, int]], checksums: bool = True) -> None:
    from trainer.data.manifest import FileEntry, Manifest, SourceEntry, file_entry, write_manifest

    (directory / "tokenizer").mkdir()
    tokenizer = Manifest(kind="tokenizer", files=[])
    write_manifest(directory / "tokenizer", tokenizer)
    files = []
    for name, (documents, tokens) in written.items():
        for suffix in ("bin", "idx"):
            path = f"{name}-train-00000.{suffix}"
            counts = {"documents": documents, "tokens": tokens} if suffix == "bin" else {}
            about = {"source": name, "split": "train", **counts}
            size = (directory / "shards" / path).stat().st_size
            entry = FileEntry(path=path, bytes=size, algorithm="xxh3_128", checksum="", **about)
            files.append(file_entry(directory / "shards", path, **about) if checksums else entry)
    sources = {name: SourceEntry(domain="en", licence="none", origin="made", revision="1") for name in written}
    inputs = {"tokenizer": tokenizer.digest}
    write_manifest(directory / "shards", Manifest(kind="shards", inputs=inputs, sources=sources, files=files))


def ours(directory: Path, mix: dict[str, float], steps: int, cursor: dict | None = None) -> dict[str, float]:
    """Seconds to the first step, and tokens per second after it."""
    from trainer.data.loader import TokenLoader
    from trainer.data.plan import Cursor
    from trainer.spec import BatchSpec, MixSpec, TokensSpec

    tokens = TokensSpec(
        shards=str(directory / "shards"),
        tokenizer=str(directory / "tokenizer"),
        mix={name: MixSpec(weight=weight, max_epochs=1000) for name, weight in mix.items()},
        seq_len=SEQ_LEN,
    )
    batch = BatchSpec(tokens_per_step=STEP_ROWS * SEQ_LEN, micro_batch_rows=ROWS)
    began = time.perf_counter()
    with TokenLoader(
        tokens, batch, rank=0, world_size=1, cursor=Cursor.from_dict(cursor) if cursor else None
    ) as loader:
        step = next(loader)
        start = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(steps - 1):
            next(loader)
        seconds = time.perf_counter() - began
    rate = (steps - 1) * batch.tokens_per_step / seconds if steps > 1 else 0.0
    return {"start": start, "rate": rate, "cursor": step.cursor.to_dict()}


def peer(python: str, directory: Path, steps: int, *, apart: bool) -> dict[str, float]:
    argument = json.dumps([str(directory), SOURCES, SEQ_LEN, ROWS, steps, STEP_ROWS, apart])
    result = subprocess.run([python, "-c", PEER, argument], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"error: the peer failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python with megatron-core; without it only ours is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps of 524,288 tokens in a round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
        directory = Path(scratch)
        (directory / "shards").mkdir()
        write_corpus(directory)
        rates: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            rates.setdefault("ours", []).append(ours(directory, SOURCES, arguments.steps)["rate"])
            for name, apart in (("GPTDataset", False), ("GPTDataset, documents apart", True)):
                if arguments.peer:
                    rates.setdefault(name, []).append(
                        peer(arguments.peer, directory, arguments.steps, apart=apart)["rate"]
                    )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:30} {rate / 1e6:7.2f} M tokens/s   ours / it = {medians['ours'] / rate:.2f}")
    with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
        directory = Path(scratch)
        (directory / "shards").mkdir()
        write_index(directory)
        starts = [ours(directory, {"web": 1.0}, 1) for _ in range(arguments.rounds)]
        print(f"{'start, 15B-token index':30} {min(run['start'] for run in starts):7.2f} s to the first step")
        cursor = starts[0]["cursor"]
        cursor["drawn"]["web"] = INDEX_TOKENS // 2
        resumed = [ours(directory, {"web": 1.0}, 1, cursor) for _ in range(arguments.rounds)]
        print(f"{'the same, in mid-epoch':30} {min(run['start'] for run in resumed):7.2f} s to the first step")
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()

"""Bytes of text per token, by domain: our tokenizer against two public ones that are part of packages.

    pip install --no-deps --target work/public dashscope mistral-common
    python benchmarks/tokenizer.py work/public

Ours is trained on nine tenths of the documents of the sample corpus in this repository, 6 MB; all are measured on the
last tenth. The corpus is small and favours ours, so the result shows how the vocabularies are used, not their general
quality. The public ones, of Qwen and Mistral, have four to five times as many tokens, trained on far more text.
"""

from __future__ import annotations

import argparse
import ast
import base64
import gzip
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken

from trainer.data.tokenizer import Tokenizer, save, train

SAMPLE = Path(__file__).parents[1] / "components" / "download" / "sample"
DOMAINS = ("ko", "en", "code", "math")
Count = Callable[[str], int]


def texts(domain: str) -> tuple[list[str], list[str]]:
    """(texts to train on, texts to measure)."""
    with gzip.open(SAMPLE / f"{domain}.jsonl.gz", "rt", encoding="utf-8") as lines:
        every = [json.loads(line)["text"] for line in lines]
    return [text for n, text in enumerate(every) if n % 10], every[::10]


def qwen(packages: Path) -> tiktoken.Encoding:
    lines = (packages / "dashscope/resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    path = packages / "dashscope/tokenizers/qwen_tokenizer.py"
    pattern = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("PAT_STR"))
    return tiktoken.Encoding("qwen", pat_str=_string(pattern), mergeable_ranks=ranks, special_tokens={})


def _string(assignment: str) -> str:
    return ast.literal_eval(assignment.split("=", 1)[1].strip())


def mistral(packages: Path) -> tiktoken.Encoding:
    value = json.loads((packages / "mistral_common/data/tekken_240911.json").read_bytes())
    size = value["config"]["default_vocab_size"] - value["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in value["vocab"][:size]}
    return tiktoken.Encoding("tekken", pat_str=value["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with dashscope and mistral_common")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--work", type=Path, default=Path("work/benchmark-tokenizer"))
    arguments = parser.parse_args()
    split = {domain: texts(domain) for domain in DOMAINS}
    sample = [text for training, _ in split.values() for text in training]
    megabytes = sum(len(text.encode()) for text in sample) / 1e6
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    raw = train(sample, arguments.vocab_size)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"trained on {megabytes:.1f} MB: {megabytes / seconds:.1f} MB per CPU s", end="")
    print(f", peak {peak >> 10} MiB ({before >> 10} before)")
    arguments.work.mkdir(parents=True, exist_ok=True)
    save(raw, arguments.work)
    tokenizer = Tokenizer.load(arguments.work)
    public = {"Qwen": qwen(arguments.packages), "Mistral Tekken": mistral(arguments.packages)}
    counts: dict[str, tuple[int, Count]] = {"ours": (tokenizer.vocab_size, lambda text: len(tokenizer.encode(text)))}
    for name, encoding in public.items():
        counts[name] = (encoding.n_vocab, lambda text, e=encoding: len(e.encode_ordinary(text)))
    print(f"{'bytes per token':16}{'vocabulary':>11}" + "".join(f"{domain:>8}" for domain in DOMAINS))
    for name, (size, count) in counts.items():
        row = []
        for _, held in split.values():
            row.append(sum(len(text.encode()) for text in held) / sum(count(text) for text in held))
        print(f"{name:16}{size:11,}" + "".join(f"{value:8.2f}" for value in row))


if __name__ == "__main__":
    main()

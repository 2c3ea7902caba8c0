"""The hygiene filters on the sample corpus: what they leave out, their speed, and their judgement beside datatrove's.

    python benchmarks/hygiene.py

Everything runs in one process on one core. MB are 10⁶ bytes of UTF-8 text. datatrove (with nltk and spaCy) is compared
where it is installed; both get the English texts, since its rules are of one language. Its words come
from a tokenizer, ours from white space, so texts near a limit may be judged differently. `datasketch` makes MinHash
signatures of the same runs of words.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from components.hygiene.contamination import GramHasher, words
from components.hygiene.duplicates import ExactDuplicates
from components.hygiene.filters import Filter
from components.hygiene.near_duplicates import HASHES, WORDS, NearDuplicates, signatures
from components.hygiene.quality import Quality, broken_rule

SAMPLE = Path(__file__).parents[1] / "components" / "download" / "sample"
DOMAINS = ("ko", "en", "code", "math")


def main() -> None:
    corpus = {name: _texts(name) for name in DOMAINS}
    size = sum(len(text.encode()) for texts in corpus.values() for text in texts)
    print(f"{size / 1e6:.2f} MB, {sum(map(len, corpus.values()))} documents")
    filters: list[Filter] = [
        ExactDuplicates(),
        NearDuplicates(0.8),
        Quality(["en", "ko", "math"], {n: n for n in DOMAINS}),
    ]
    for each in filters:
        _measure(each, corpus, size)
    english = corpus["en"]
    print(f"English, {sum(len(text.encode()) for text in english) / 1e6:.2f} MB:")
    _signatures(english)
    _judgement(english)


def _measure(each: Filter, corpus: dict[str, list[str]], size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scans, seconds = list[Path](), 0.0
        for name, texts in corpus.items():
            scanner = each.scanner()
            began = time.process_time()
            for number, text in enumerate(texts):
                scanner.see(number, number, text)
            array = scanner.result()
            seconds += time.process_time() - began
            scans.append(Path(folder) / f"{name}.npy")
            np.save(scans[-1], array)
        drops = [drop for some in each.decide(scans, [f"{name}/part" for name in corpus]) for drop in some]
    left_out = {name: sum(drop.file == at for drop in drops) for at, name in enumerate(corpus)}
    said = ", ".join(f"{name} {count} of {len(corpus[name])}" for name, count in left_out.items())
    print(f"{each.name}: {size / 1e6 / seconds:.1f} MB/s; leaves out {said}")


def _signatures(texts: list[str]) -> None:
    hasher = GramHasher(WORDS)
    runs = [grams for text in texts if len(grams := hasher(words(text)))]
    ours = _timed(lambda: signatures(runs))
    try:
        from datasketch import MinHash
    except ImportError:
        print("  signatures: datasketch is not installed")
        return

    def theirs() -> None:
        for grams in runs:
            MinHash(num_perm=HASHES, hashfunc=int).update_batch((grams >> np.uint64(32)).tolist())

    other = _timed(theirs)
    print(f"  signatures: ours (rensa) {ours:.3f} s, datasketch {other:.3f} s, ratio {other / ours:.1f}")


def _judgement(texts: list[str]) -> None:
    try:
        from datatrove.data import Document
        from datatrove.pipeline.filters import (
            GopherQualityFilter,
            GopherRepetitionFilter,
            gopher_quality_filter,
            gopher_repetition_filter,
        )

        quality, repetition = GopherQualityFilter(), GopherRepetitionFilter()
        stays = [quality.filter(Document(text="warm up", id="0")), repetition.filter(Document(text="warm up", id="0"))]
    except Exception as error:  # its tokenizers may be missing in several ways
        print(f"  quality: datatrove cannot be compared ({type(error).__name__}: {str(error)[:80]})")
        return

    def keeps(text: str) -> bool:
        one = Document(text=text, id="0")
        return quality.filter(one) is True and repetition.filter(one) is True

    mine = list[bool]()
    ours = _timed(lambda: mine.extend(broken_rule(text, "en") is None for text in texts))
    for said in ("its own words", "words by white space"):
        stays.clear()
        other = _timed(lambda: stays.extend(keeps(text) for text in texts))
        same = sum(one == two for one, two in zip(mine, stays, strict=True))
        print(
            f"  quality: ours {ours:.2f} s, datatrove with {said} {other:.2f} s, ratio {other / ours:.1f}; the same "
            f"judgement of {same} of {len(texts)}; ours leaves out {mine.count(False)}, datatrove {stays.count(False)}"
        )
        for module in (gopher_quality_filter, gopher_repetition_filter):
            module.split_into_words = lambda text, *_: text.split()


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _texts(name: str) -> list[str]:
    with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


if __name__ == "__main__":
    main()

"""Shares of distinct n-grams against sets of tuples."""

from pathlib import Path

import numpy as np
from data_cases import write_shards
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.distinct import distinct, distinct_of

DOCUMENTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), max_size=6)


def by_sets(documents: list[list[int]]) -> tuple[float, ...]:
    grams = [[tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1)] for n in (1, 2, 3)]
    return tuple(len(set(some)) / max(len(some), 1) for some in grams)


@given(DOCUMENTS)
def test_shares_are_those_of_sets(documents: list[list[int]]) -> None:
    assert distinct([np.array(document, np.uint16) for document in documents]) == by_sets(documents)


def test_sources_are_compared_over_equally_many_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    real = [rng.integers(1, 500, size=40).astype(np.uint16) for _ in range(30)]
    degenerate = [np.tile(np.array([5, 6, 7], np.uint16), 10) for _ in range(20)]
    manifest = write_shards(
        tmp_path, {n: {"train": some, "heldout": some[:2]} for n, some in (("en", real), ("ko", degenerate))}
    )
    size, found = distinct_of(tmp_path / "shards", manifest)
    assert size == 600 and found["ko"] == (3 / 600, 3 / (600 - 20), 3 / (600 - 40))
    order = [*real[0::2], *real[1::2]][:15]
    assert found["en"] == by_sets([document.tolist() for document in order])

"""Rows of a step: exactly its tokens with every packing; best fit splits few documents."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import best_fit, concatenate
from trainer.data.plan import Segment


def step_of(lengths: list[int], seq_len: int) -> list[Segment]:
    """Documents of these lengths, the last one cut so that the step is whole rows."""
    segments = [Segment(n % 3, n, 0, length, continues=False) for n, length in enumerate(lengths)]
    extra = sum(lengths) % seq_len
    while extra:
        last = segments.pop()
        if last.stop > extra:
            segments.append(Segment(last.source, last.document, 0, last.stop - extra, continues=True))
            break
        extra -= last.stop
    return segments


def tokens(rows: list[list[Segment]]) -> list[tuple[int, int]]:
    return [(s.document, at) for row in rows for s in row for at in range(s.start, s.stop)]


@pytest.mark.parametrize("pack", [concatenate, best_fit])
@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=60), seq_len=st.integers(1, 40))
def test_rows_hold_exactly_the_tokens_of_the_step(pack, lengths: list[int], seq_len: int) -> None:
    segments = step_of(lengths, seq_len)
    rows = pack(segments, seq_len)
    assert all(sum(s.stop - s.start for s in row) == seq_len for row in rows)
    assert sorted(tokens(rows)) == sorted(tokens([segments]))
    ends = {s.document: (s.stop, s.continues) for s in segments}
    for row in rows:
        assert len({s.document for s in row}) == len(row), "a document stands twice in a row"
        for s in row:
            stop, continues = ends[s.document]
            assert s.continues == (continues if s.stop == stop else True)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=60), seq_len=st.integers(1, 40))
def test_concatenation_keeps_the_order_of_the_stream(lengths: list[int], seq_len: int) -> None:
    segments = step_of(lengths, seq_len)
    assert tokens(concatenate(segments, seq_len)) == tokens([segments])


def test_best_fit_keeps_whole_what_can_be() -> None:
    segments = [Segment(0, n, 0, length, continues=False) for n, length in enumerate([6, 7, 3, 4])]
    assert [[s.document for s in row] for row in best_fit(segments, 10)] == [[0, 3], [1, 2]]


def test_best_fit_cuts_a_fraction_of_what_concatenation_cuts() -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(6, 1, 1500)).astype(int).tolist()
    segments = step_of(lengths, 4096)

    def documents_cut(rows: list[list[Segment]]) -> int:
        pieces = Counter(s.document for row in rows for s in row)
        return sum(pieces[s.document] > -(-(s.stop - s.start) // 4096) for s in segments)

    by_fit, by_place = documents_cut(best_fit(segments, 4096)), documents_cut(concatenate(segments, 4096))
    assert by_fit * 10 < by_place, f"{by_fit} and {by_place} documents cut"

"""The order of documents by a score: against plain NumPy, for ranks, resumption and growth; and the scores' files."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import tokens_spec, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.loader import TokenLoader
from trainer.data.order import SourceOrder
from trainer.data.plan import Cursor, TokenStream
from trainer.data.scores import compression, read_scores, write_scores
from trainer.errors import DataError
from trainer.spec import BatchSpec, MixSpec, OrderSpec

LENGTHS = {"ko": np.array([5, 1, 9, 3, 3, 17, 3, 8], np.int32), "en": np.array([2, 2, 40, 4], np.int32)}
NEUTRAL = "c363244767ba78358094f68e14381e8d072447afe341a4b6f2ea48c83c62ce28"  # of the version before
BY_LENGTH = OrderSpec(by="length", bands=None)


@settings(deadline=None)
@given(
    values=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    bands=st.none() | st.integers(2, 12),
    epoch=st.integers(0, 2),
)
def test_the_sort_is_numpys(values: list[int], bands: int | None, epoch: int) -> None:
    lengths = np.full(len(values), 3, np.int32)
    random = SourceOrder("ko", lengths, 7).permutation(epoch)(0, len(values)).tolist()
    found = SourceOrder("ko", lengths, 7, None, np.array(values), bands).permutation(epoch)(0, len(values)).tolist()
    if bands is None:
        assert found == sorted(random, key=lambda document: values[document])
        return
    by_score = sorted(range(len(values)), key=lambda document: values[document])
    band_of = {document: rank * bands // len(values) for rank, document in enumerate(by_score)}
    assert found == sorted(random, key=lambda document: band_of[document])


def test_a_large_source_is_sorted_too() -> None:
    scores = np.random.default_rng(0).random(2**16 + 5)
    order = SourceOrder("ko", np.ones(len(scores), np.int32), 1, None, scores, 10)
    documents = order.permutation(0)(0, len(scores))
    assert sorted(documents.tolist()) == list(range(len(scores)))
    band = np.empty(len(scores), np.int64)
    band[np.argsort(scores)] = np.arange(len(scores)) * 10 // len(scores)
    assert (np.diff(band[documents]) >= 0).all()
    assert abs(np.corrcoef(np.arange(3000), scores[documents[:3000]])[0, 1]) < 0.1, "at random within a band"


def stream(order: OrderSpec | None, cursor: Cursor | None = None, count: int = 8, **fields: object) -> TokenStream:
    mix = {"ko": MixSpec(weight=0.6, max_epochs=99, order=order), "en": MixSpec(weight=0.4, max_epochs=99)}
    lengths = LENGTHS | {"ko": LENGTHS["ko"][:count]}
    return TokenStream(lengths, mix, 3, f"digest {count}", cursor=cursor, **fields)


def test_each_epoch_ascends_and_a_resumption_anywhere_is_exact() -> None:
    whole = stream(BY_LENGTH).take(150)
    starts = [int(LENGTHS["ko"][part.document]) for part in whole if part.source == 0 and part.start == 0]
    assert starts[:8] == sorted(LENGTHS["ko"]) and starts[8:13] == sorted(LENGTHS["ko"])[:5]

    def tokens(parts: list) -> list[tuple[int, int, int]]:
        return [(p.source, p.document, at) for p in parts for at in range(p.start, p.stop)]

    for cut in range(0, 150, 7):
        running = stream(BY_LENGTH)
        running.take(cut)
        assert tokens(stream(BY_LENGTH, running.cursor()).take(150 - cut)) == tokens(whole)[cut:]
    descending = stream(OrderSpec(by="length", ascending=False, bands=None)).take(20)
    assert next(part for part in descending if part.source == 0).document == 5, "the longest first"


def test_another_order_is_another_plan_and_none_is_the_plan_of_before() -> None:
    running = stream(BY_LENGTH)
    running.take(20)
    for other in (None, OrderSpec(by="length"), OrderSpec(by="length", bands=None, ascending=False)):
        with pytest.raises(DataError, match="other shards, mix weights"):
            stream(other, running.cursor())
    assert stream(None).digest() == NEUTRAL


def test_appended_documents_come_after_all_old_ones_each_part_sorted() -> None:
    running = stream(BY_LENGTH, count=5)
    running.take(9)
    grown = stream(BY_LENGTH, running.cursor(), earlier=[("digest 5", {"ko": 5, "en": 4})])
    documents = [part.document for part in [*grown.take(90)] if part.source == 0]
    new = [document for document in documents if document >= 5]
    assert new[:3] == [6, 7, 5] and set(documents[: documents.index(6)]) <= set(range(5))


def test_ranks_get_the_rows_of_one_rank_in_the_order_of_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    documents = {"ko": [rng.integers(1, 500, size=n).astype(np.uint16) for n in rng.integers(3, 30, size=60)]}
    write_shards(tmp_path, {"ko": {"train": documents["ko"], "heldout": documents["ko"][:2]}})
    plain = tokens_spec(tmp_path, {"ko": 1.0})
    sorted_by = plain.model_copy(
        update={"mix": {"ko": plain.mix["ko"].model_copy(update={"order": OrderSpec(by="length", bands=4)})}}
    )
    batch = BatchSpec(tokens_per_step=128, micro_batch_rows=2)

    def rows(spec, world: int, steps: int = 4) -> torch.Tensor:
        ranks = []
        for rank in range(world):
            with TokenLoader(spec, batch, rank=rank, world_size=world) as loader:
                ranks.append([next(loader) for _ in range(steps)])
        return torch.cat(
            [micro.ids_BT for step in zip(*ranks, strict=True) for one in step for micro in one.micro_batches]
        )

    assert torch.equal(rows(sorted_by, 1), rows(sorted_by, 2)) and not torch.equal(rows(sorted_by, 1), rows(plain, 1))
    by_score = sorted_by.model_copy(
        update={"mix": {"ko": plain.mix["ko"].model_copy(update={"order": OrderSpec(by="compression", bands=4)})}}
    )
    with pytest.raises(DataError, match=r"\.scores: missing; run the shards step again"):
        TokenLoader(by_score, batch, rank=0, world_size=1)


def test_files_of_scores(tmp_path: Path) -> None:
    write_scores(tmp_path / "ko-train-00000", np.array([0.5, 2.25], np.float32))
    assert read_scores(tmp_path / "ko-train-00000", 2).tolist() == [0.5, 2.25]
    with pytest.raises(DataError, match="not the scores of 3 documents"):
        read_scores(tmp_path / "ko-train-00000", 3)
    text = ("가나다 " * 100).encode()
    assert compression(text) == len(zlib.compress(text)) / len(text) < 0.1 and compression(b"") == 0

"""Orders by a score together with what else shapes the stream: stages, skips, growth, ranks; and what is a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import random_documents, tokens_spec, write_shards

from trainer.data.documents import open_shards, open_stream
from trainer.data.loader import TokenLoader
from trainer.data.order import SourceOrder
from trainer.data.plan import Cursor, Segment, TokenStream
from trainer.data.scores import number
from trainer.errors import DataError, SpecError
from trainer.spec import BatchSpec, MixSpec, OrderSpec, StageSpec
from trainer.specbase import parse

LENGTHS = {name: np.random.default_rng(at).integers(1, 30, 40 + at).astype(np.int32) for at, name in enumerate("abc")}
SCORES = {"b": np.random.default_rng(9).normal(size=41).astype(np.float32)}
ORDERS = {
    "a": OrderSpec(by="length", bands=4),
    "b": OrderSpec(by="column", column="quality", ascending=False, bands=7),
    "c": None,
}


def stream(orders: dict[str, OrderSpec | None] = ORDERS, cursor: Cursor | None = None, **fields: Any) -> TokenStream:
    mix = {name: MixSpec(weight=1 / 3, max_epochs=1000, order=orders[name]) for name in LENGTHS}
    lengths, digest = fields.pop("lengths", LENGTHS), fields.pop("digest", "digest")
    scores = fields.pop("scores", SCORES)
    return TokenStream(lengths, mix, 3, digest, cursor=cursor, scores=scores, **fields)


def tokens_of(segments: list[Segment]) -> list[tuple[int, int, int]]:
    return [(s.source, s.document, at) for s in segments for at in range(s.start, s.stop)]


def test_one_band_is_the_order_without_bands() -> None:
    lengths = np.random.default_rng(1).integers(1, 99, 500).astype(np.int32)
    usual = SourceOrder("web", lengths, 5, [300, 200])
    one = SourceOrder("web", lengths, 5, [300, 200], lengths, 1)
    for epoch in range(3):
        assert np.array_equal(usual.permutation(epoch)(0, 500), one.permutation(epoch)(0, 500))
    whole = tokens_of(stream(dict.fromkeys("abc")).take(3000))
    assert tokens_of(stream({name: OrderSpec(by="length", bands=1) for name in "abc"}).take(3000)) == whole


def test_each_generation_has_its_own_bands_after_those_before() -> None:
    scores = np.random.default_rng(2).normal(size=50).astype(np.float32)
    epoch = SourceOrder("web", np.ones(50, np.int32), 5, [20, 30], scores, 5).permutation(0)(0, 50).tolist()
    for first, size in ((0, 20), (20, 30)):
        ranked = (np.argsort(scores[first : first + size], kind="stable") + first).tolist()
        for at in range(0, size, size // 5):
            band = slice(first + at, first + at + size // 5)
            assert sorted(epoch[band]) == sorted(ranked[at : at + size // 5])
    assert (
        epoch[:20] == SourceOrder("web", np.ones(20, np.int32), 5, [20], scores[:20], 5).permutation(0)(0, 20).tolist()
    )


def test_the_stream_is_the_same_after_resumption_within_stages_and_over_skips() -> None:
    stages = [StageSpec(from_tokens=500, weights={"a": 0.7, "c": 0.3})]
    whole = tokens_of(stream(curriculum=stages).take(1600))
    assert whole != tokens_of(stream(dict.fromkeys("abc"), curriculum=stages).take(1600))
    running = stream(curriculum=stages)
    for at in range(0, 1400, 3):
        resumed = stream(cursor=Cursor.from_dict(running.cursor().to_dict()), curriculum=stages)
        assert tokens_of(resumed.take(100)) == whole[at : at + 100]
        running.take(3)
    assert tokens_of(stream(curriculum=stages, skip=[(50, 300)]).take(1000)) == whole[:50] + whole[300:1250]


def test_a_run_goes_on_into_appended_documents_or_keeps_its_own_with_their_scores() -> None:
    more = {name: np.concatenate([lengths, lengths[:9] + 1]) for name, lengths in LENGTHS.items()}
    scores = {"b": np.concatenate([SCORES["b"], SCORES["b"][:9] - 5])}
    earlier = [("digest", {name: len(lengths) for name, lengths in LENGTHS.items()})]
    grown: dict[str, Any] = {"lengths": more, "scores": scores, "digest": "later", "earlier": earlier}
    whole = tokens_of(stream(**grown).take(2500))
    running = stream()
    assert tokens_of(running.take(900)) == whole[:900]
    resumed = stream(cursor=running.cursor(), **grown)
    assert (resumed.left_out, tokens_of(resumed.take(1600))) == (0, whole[900:])
    running.take(1600)  # into a second epoch
    beyond = stream(cursor=running.cursor(), **grown)
    assert beyond.left_out == 27 and tokens_of(beyond.take(500)) == tokens_of(running.take(500))


def test_a_checkpoint_of_another_order_is_refused() -> None:
    running = stream()
    running.take(100)
    for other in ({"by": "column", "column": "age", "ascending": False, "bands": 7}, {"by": "length"}, None):
        orders = ORDERS | {"b": parse(OrderSpec, other) if other else None}
        with pytest.raises(DataError, match="or with another order of a source; give those back"):
            stream(orders, cursor=running.cursor())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ordered")
    made = {name: {"train": random_documents(n, 150), "heldout": random_documents(n, 3)} for n, name in enumerate("ab")}
    write_shards(directory, made)
    return directory


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_ranks_share_the_stream_and_resume_after_any_step(directory: Path, packing: str) -> None:
    mix = {name: MixSpec(weight=0.5, max_epochs=99, order=OrderSpec(by="length", bands=5)) for name in "ab"}
    spec = tokens_spec(directory, {}, mix=mix, packing=packing)
    batch = BatchSpec(tokens_per_step=256, micro_batch_rows=2)

    def rows(world: int, steps: int, cursor: Cursor | None = None) -> tuple[list[list[list[int]]], list[Cursor]]:
        loaders = [TokenLoader(spec, batch, rank=rank, world_size=world, cursor=cursor) for rank in range(world)]
        found, cursors = [], []
        for _ in range(steps):
            step = [next(loader) for loader in loaders]
            found.append([row for one in step for m in one.micro_batches for row in m.ids_BT.tolist()])
            cursors.append(loaders[0].cursor)
        for loader in loaders:
            loader.close()
        return found, cursors

    alone, cursors = rows(1, 12)
    assert rows(2, 12)[0] == alone
    for done in range(1, 12, 2):
        assert rows(2, 12 - done, cursors[done - 1])[0] == alone[done:]


def test_shards_with_other_scores_than_the_order_wants_are_refused(directory: Path) -> None:
    mix = {"a": MixSpec(weight=1, order=OrderSpec(by="column", column="quality"))}
    spec = tokens_spec(directory, {}, mix=mix)
    with pytest.raises(
        DataError, match="scores of source 'a' are by compression, not by quality as its order; run the"
    ):
        open_stream(spec, *open_shards(spec))


@pytest.mark.parametrize("value", [None, True, "", "high", [1], float("nan"), float("inf"), 1e39, -(10**400)])
def test_what_is_no_score(value: Any) -> None:
    with pytest.raises(ValueError):
        number(value)


def test_what_is_a_score() -> None:
    assert [number(value) for value in (3, -2.5, "0.25", " 1e3 ")] == [3, -2.5, 0.25, 1000]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"by": "column"}, r"order\.by: column needs the column's name, as in order: \{by: column, column: quality\}"),
        ({"by": "length", "column": "quality"}, "order.column quality has no effect by length; write by: column, or"),
        ({"by": "loss"}, "'length', 'compression' or 'column'"),
        ({"by": "length", "bands": 0}, "bands"),
    ],
)
def test_an_order_that_says_nothing_is_refused(order: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse(OrderSpec, order)

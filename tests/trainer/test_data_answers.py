"""The list of answers beside a shard: golden bytes, damage, and the labels that the loader makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import random_documents, tokens_spec, write_shards

from trainer.data.answers import Answers, count_trained, trained, write_answers
from trainer.data.documents import SourceDocuments
from trainer.data.loader import IGNORED, StepBatch, TokenLoader
from trainer.data.manifest import read_manifest, write_manifest
from trainer.errors import DataError
from trainer.spec import BatchSpec

COUNTS, RANGES = np.array([2, 0, 1]), np.array([[1, 3], [3, 4], [0, 2**16]], np.uint32)
GOLDEN = b"YAOANSW1" + bytes.fromhex(
    "0300000000000000"
    "0000000000000000 0200000000000000 0200000000000000 0300000000000000"
    "01000000 03000000 03000000 04000000 00000000 00000100"
)
LENGTHS = np.array([4, 7, 2**16])


def test_bytes_are_golden_and_read_back(tmp_path: Path) -> None:
    write_answers(tmp_path / "a", COUNTS, RANGES)
    assert (tmp_path / "a.answers").read_bytes() == GOLDEN
    answers = Answers(tmp_path / "a", 3)
    answers.check(LENGTHS)
    assert [answers[n].tolist() for n in range(len(answers))] == [[[1, 3], [3, 4]], [], [[0, 2**16]]]
    write_answers(tmp_path / "none", np.array([0, 0]), np.empty((0, 2), np.uint32))
    nothing = Answers(tmp_path / "none", 2)
    nothing.check(np.array([1, 1]))
    assert [len(nothing[n]) for n in range(2)] == [0, 0]


def test_a_missing_cut_or_foreign_file_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.answers: missing"):
        Answers(tmp_path / "a", 3)
    for size in range(len(GOLDEN)):
        (tmp_path / "a.answers").write_bytes(GOLDEN[:size])
        with pytest.raises(DataError, match=r"a\.answers: damaged"):
            Answers(tmp_path / "a", 3)
    (tmp_path / "a.answers").write_bytes(GOLDEN)
    with pytest.raises(DataError, match=r"4 documents with 3 answers need"):
        Answers(tmp_path / "a", 4)


@pytest.mark.parametrize(
    ("counts", "ranges"),
    [
        ([2, 0, 1], [[1, 3], [2, 4], [0, 5]]),  # overlap
        ([2, 0, 1], [[1, 3], [3, 5], [0, 5]]),  # the first document has 4 tokens
        ([2, 0, 1], [[1, 3], [3, 3], [0, 5]]),  # empty
        ([-1, 3, 1], [[1, 3], [3, 4], [0, 5]]),
    ],
)
def test_ranges_that_do_not_fit_the_documents_are_refused(tmp_path: Path, counts: list, ranges: list) -> None:
    write_answers(tmp_path / "a", np.array(counts), np.array(ranges, np.uint32))
    with pytest.raises(DataError, match=r"a\.answers: damaged \([^\n]*\); run the shards step again"):
        Answers(tmp_path / "a", 3).check(LENGTHS)


def test_a_mask_is_cut_like_its_tokens() -> None:
    ranges = np.array([[2, 5], [7, 8]], np.uint32)
    whole = [2 <= n < 5 or n == 7 for n in range(10)]
    for start in range(10):
        for stop in range(start, 11):
            assert trained(ranges, start, stop).tolist() == whole[start:stop]
            assert count_trained(ranges, start, stop) == sum(whole[start:stop])


EN = 2048  # the least token of source en; end of document aside


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of source ko, the odd tokens are answers; of en, all tokens are trained."""
    path = tmp_path_factory.mktemp("answers")
    documents = {
        name: {
            "train": [
                np.where(d == 0, 0, d % (EN - 1) + 1 + n * (EN - 1)).astype("u2") for d in random_documents(n, 60)
            ]
        }
        for n, name in enumerate(["ko", "en"])
    }
    write_shards(path, documents, answers=("ko",))
    return path


def read(directory: Path, weights: dict[str, float], ranks: int, packing: str) -> list[list[StepBatch]]:
    """30 steps of every rank."""
    spec, found = tokens_spec(directory, weights, packing=packing), []
    for rank in range(ranks):
        batch = BatchSpec(tokens_per_step=512, micro_batch_rows=2)
        with TokenLoader(spec, batch, rank=rank, world_size=ranks) as loader:
            found.append([next(loader) for _ in range(30)])
    return [list(step) for step in zip(*found, strict=True)]


def rows(step: list[StepBatch]) -> tuple[torch.Tensor, ...]:
    """Ids, labels and numbers of documents of the whole step, [rows, T] each."""
    micro = [batch for rank in step for batch in rank.micro_batches]
    return tuple(torch.cat([getattr(batch, n) for batch in micro]) for n in ("ids_BT", "labels_BT", "seq_idx_BT"))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_labels_are_the_odd_tokens_wherever_rows_are_cut(directory: Path, packing: str, ranks: int) -> None:
    ends = 0
    for step in read(directory, {"ko": 1.0}, ranks, packing):
        ids, labels, seq_idx = rows(step)
        inside = seq_idx[:, :-1] == seq_idx[:, 1:]
        expected = torch.where(ids[:, 1:] % 2 == 1, ids[:, 1:], IGNORED)
        assert torch.equal(labels[:, :-1][inside], expected[inside])
        assert ((labels == IGNORED) | (labels % 2 == 1)).all(), "also where the next token is in another row"
        last = labels[:, -1]
        if packing == "concat":  # the next row goes on with the same document
            expected = torch.where((ids[:-1, -1] != 0) & (ids[1:, 0] % 2 == 1), ids[1:, 0], IGNORED)
            assert torch.equal(last[:-1], expected)
        ends += int((last != IGNORED).sum())
        assert all(rank.num_labels == int((labels != IGNORED).sum()) and rank.answers_only for rank in step)
    assert ends > 10


def test_a_mix_trains_all_tokens_of_its_other_sources(directory: Path) -> None:
    for (step,) in read(directory, {"ko": 0.5, "en": 0.5}, 1, "best_fit"):
        ids, labels, seq_idx = rows([step])
        this, following, inside = ids[:, :-1], ids[:, 1:], seq_idx[:, :-1] == seq_idx[:, 1:]
        expected = torch.where((this >= EN) | (following % 2 == 1), following, IGNORED)
        assert torch.equal(labels[:, :-1][inside], expected[inside])
        assert step.num_labels == int((labels != IGNORED).sum())
        assert (this >= EN).any() and (expected[this < EN] == IGNORED).any()


def test_shards_of_which_only_some_list_answers_are_refused(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path, {"ko": {"train": random_documents(0, 9)}}, answers=("ko",))
    cut = manifest.model_copy(update={"files": manifest.files[:-1]})
    write_manifest(tmp_path / "shards", cut)
    with pytest.raises(DataError, match=r"only some shards of source 'ko' have \.answers; run the shards step again"):
        SourceDocuments(tmp_path / "shards", read_manifest(tmp_path / "shards"), "ko", "train")

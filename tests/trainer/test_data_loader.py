"""Batches: independent of ranks and resumption, labels and boundaries against the documents, damage refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import random_documents, tokens_spec, write_shards

from trainer.data import loader as loading
from trainer.data.loader import IGNORED, StepBatch, TokenLoader, heldout_documents
from trainer.data.manifest import Manifest, file_entry, read_manifest, write_manifest
from trainer.data.plan import Cursor
from trainer.errors import ForeseenError
from trainer.spec import BatchSpec, MixSpec, TokensSpec

WEIGHTS = {"ko": 0.4, "en": 0.35, "code": 0.25}
BATCH = BatchSpec(tokens_per_step=16 * 32, micro_batch_rows=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    documents = {
        name: {"train": random_documents(n, 60), "heldout": random_documents(n + 10, 4)}
        for n, name in enumerate(WEIGHTS)
    }
    write_shards(path, documents)
    return path


@pytest.fixture(scope="module")
def spec(directory: Path) -> TokensSpec:
    return tokens_spec(directory, WEIGHTS)


def steps(
    count: int, spec: TokensSpec, batch: BatchSpec = BATCH, world_size: int = 1, **fields: object
) -> list[list[StepBatch]]:
    """`count` steps of every rank."""
    ranks = []
    for rank in range(world_size):
        with TokenLoader(spec, batch, rank=rank, world_size=world_size, **fields) as loader:
            ranks.append([next(loader) for _ in range(count)])
    return [list(step) for step in zip(*ranks, strict=True)]


def rows(step: list[StepBatch]) -> torch.Tensor:
    """Ids, labels and boundaries of the global step's rows: [3, rows, T]."""
    micro = [m for rank in step for m in rank.micro_batches]
    for m in micro:
        assert m.num_documents == sum(len(row.unique()) for row in m.seq_idx_BT)
    tensors = ("ids_BT", "labels_BT", "seq_idx_BT")
    fields = [torch.cat([getattr(m, name) for m in micro]).long() for name in tensors]
    return torch.stack(fields)


LARGE = {"tokens_per_step": 256 * 32}


@pytest.fixture(scope="module")
def alone(spec: TokensSpec) -> list[list[StepBatch]]:
    """10,240 rows as one rank with large micro-batches reads them."""
    return steps(40, spec, BatchSpec(**LARGE, micro_batch_rows=16))


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(1, 1), (2, 2), (4, 1), (8, 2)])
def test_steps_are_the_same_for_every_number_of_ranks(
    spec: TokensSpec, alone: list[list[StepBatch]], world_size: int, micro_batch_rows: int
) -> None:
    batch = BatchSpec(**LARGE, micro_batch_rows=micro_batch_rows)
    for ours, theirs in zip(steps(40, spec, batch, world_size), alone, strict=True):
        assert torch.equal(rows(ours), rows(theirs))
        for rank in ours:
            assert len(rank.micro_batches) == 256 // world_size // micro_batch_rows
            for field in ("num_labels", "num_rows", "tokens_by_source", "cursor"):
                assert getattr(rank, field) == getattr(theirs[0], field)


def test_resume_after_every_step_gives_equal_batches(spec: TokensSpec) -> None:
    straight = [step[0] for step in steps(203, spec)]
    for k in range(201):
        cursor = Cursor.from_dict(straight[k - 1].cursor.to_dict()) if k else None
        world_size = 8 if k % 20 == 0 else 1 + k % 2
        for ahead, step in enumerate(steps(2, spec, world_size=world_size, cursor=cursor)):
            assert torch.equal(rows(step), rows([straight[k + ahead]]))
            assert step[0].cursor == straight[k + ahead].cursor


def test_batches_are_the_documents_in_order_with_labels_inside_them(spec: TokensSpec, directory: Path) -> None:
    """Reassembled from ids alone, the stream is whole documents; labels and boundaries follow from it."""
    stream = torch.cat([rows(step).transpose(0, 1) for step in steps(60, spec)])  # [rows, 3, T]
    ids, labels, seq_idx = stream[:, 0].flatten(), stream[:, 1].flatten(), stream[:, 2]
    ends = ids == 0
    expected = torch.where(ends[:-1], torch.tensor(IGNORED), ids[1:])
    assert torch.equal(labels[:-1], expected)
    assert torch.equal(seq_idx, torch.cumsum(stream[:, 0].roll(1, 1).eq(0).index_fill(1, torch.tensor([0]), False), 1))
    known = {tuple(d.tolist()) for n, _ in enumerate(WEIGHTS) for d in random_documents(n, 60)}
    pieces = np.split(ids.numpy(), np.flatnonzero(ends.numpy()) + 1)[:-1]
    assert len(pieces) > 300 and all(tuple(piece.tolist()) in known for piece in pieces)


def test_without_the_document_mask_a_row_is_one_document(spec: TokensSpec) -> None:
    """Same tokens and labels, so the losses of both kinds of run are over the same positions."""
    for masked, open_ in zip(steps(4, spec), steps(4, spec.updated({"document_mask": False})), strict=True):
        before, after = rows(masked), rows(open_)
        assert torch.equal(before[:2], after[:2]) and before[2].max() > 0 and after[2].max() == 0
        assert masked[0].num_labels == open_[0].num_labels


def test_counts_are_those_of_the_whole_step(spec: TokensSpec) -> None:
    total = dict.fromkeys(WEIGHTS, 0)
    for number, step in enumerate(steps(20, spec, world_size=4), 1):
        assert step[0].num_labels == int((rows(step)[1] != IGNORED).sum())
        assert step[0].num_rows == 16
        assert sum(step[0].tokens_by_source.values()) == number * 512
        assert all(step[0].tokens_by_source[name] >= total[name] for name in WEIGHTS)
        total = step[0].tokens_by_source


def test_epochs_are_those_of_the_steps_given_out(spec: TokensSpec) -> None:
    with TokenLoader(spec, BATCH, rank=0, world_size=1) as loader:
        assert loader.epochs() == dict.fromkeys(WEIGHTS, 0.0)
        for _ in range(30):
            ledger = next(loader).tokens_by_source
        available = {name: sum(map(len, random_documents(n, 60))) for n, name in enumerate(WEIGHTS)}
        assert loader.epochs() == {name: ledger[name] / available[name] for name in WEIGHTS}


def test_a_failure_of_the_thread_reaches_the_caller(spec: TokensSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("volume gone")

    monkeypatch.setattr(loading.SourceDocuments, "tokens", fail)
    with TokenLoader(spec, BATCH, rank=0, world_size=1) as loader, pytest.raises(OSError, match="volume gone"):
        next(loader)


def test_a_rank_with_a_gpu_gets_pinned_batches(spec: TokensSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, devices = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: devices.append((threading.current_thread().name, gpu)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    with TokenLoader(spec, BATCH, rank=0, world_size=1) as loader:
        batches = next(loader).micro_batches
    assert devices == [("prefetch", 3)]
    given = [tensor for batch in batches for tensor in (batch.ids_BT, batch.labels_BT, batch.seq_idx_BT)]
    assert all(any(tensor is one for one in pinned) for tensor in given)


def test_sequence_length_may_change_on_the_way(spec: TokensSpec) -> None:
    first, second = (step[0] for step in steps(2, spec))
    longer = spec.updated({"seq_len": 128})
    (step,) = steps(1, longer, BatchSpec(tokens_per_step=512, micro_batch_rows=1), cursor=first.cursor)
    assert torch.equal(rows(step)[0].flatten(), rows([second])[0].flatten())
    assert step[0].cursor == second.cursor


CURRICULUM = [
    {"from_tokens": 1000, "weights": {"ko": 0.2, "code": 0.8}},
    {"from_tokens": 1536, "seq_len": 64},
    {"from_tokens": 3000, "weights": {"en": 1.0}, "seq_len": 16},
]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_curriculum_in_either_packing_is_the_same_for_ranks_and_resumption(spec: TokensSpec, packing: str) -> None:
    changing = spec.updated({"curriculum": CURRICULUM, "packing": packing})
    straight = steps(12, changing)
    lengths = [step[0].micro_batches[0].ids_BT.shape for step in straight]
    assert lengths == [(2, 32)] * 3 + [(1, 64)] * 3 + [(4, 16)] * 6, "micro-batches keep their tokens"
    for at in range(12):
        cursor = straight[at - 1][0].cursor if at else None
        for ahead, step in enumerate(steps(min(2, 12 - at), changing, world_size=4, cursor=cursor)):
            assert torch.equal(rows(step), rows(straight[at + ahead]))
            assert step[0].num_rows == 512 // lengths[at + ahead][1]
            assert step[0].num_labels == int((rows(step)[1] != IGNORED).sum())
    assert straight[11][0].tokens_by_source["ko"] == straight[7][0].tokens_by_source["ko"], "en alone at the end"


def test_best_fit_trains_on_the_tokens_of_concatenation(spec: TokensSpec) -> None:
    fitted = spec.updated({"packing": "best_fit"})
    for ours, theirs in zip(steps(30, fitted), steps(30, spec), strict=True):
        assert ours[0].cursor == theirs[0].cursor
        assert torch.equal(rows(ours)[0].flatten().sort()[0], rows(theirs)[0].flatten().sort()[0])


def test_skipped_tokens_are_not_in_any_batch(spec: TokensSpec) -> None:
    plain = torch.cat([rows(step)[0].flatten() for step in steps(4, spec)])
    skipping = torch.cat([rows(step)[0].flatten() for step in steps(3, spec.updated({"skip": [[700, 1212]]}))])
    assert torch.equal(skipping, torch.cat([plain[:700], plain[1212:]]))


def test_heldout_documents(spec: TokensSpec) -> None:
    found = [(source, domain, tokens.tolist(), answers) for source, domain, tokens, answers in heldout_documents(spec)]
    expected = [
        (name, name[:2], document.tolist(), None)
        for n, name in enumerate(WEIGHTS)
        for part in (0, 1)
        for document in random_documents(n + 10, 4)[part::2]
    ]
    assert found == expected


def test_digests_are_those_of_the_manifests(spec: TokensSpec) -> None:
    with TokenLoader(spec, BATCH, rank=0, world_size=1) as loader:
        assert loader.digests == {
            "shards": read_manifest(spec.shards).digest,
            "tokenizer": read_manifest(spec.tokenizer).digest,
        }


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory that a test may damage."""
    write_shards(tmp_path / "own", {"ko": {"train": random_documents(0, 10), "heldout": random_documents(1, 2)}})
    return tmp_path / "own"


def refused(directory: Path, code: int = 65, **fields: object) -> str:
    """The one line with which a loader on `directory` ends, with this code."""
    with pytest.raises(ForeseenError) as caught:
        loader = TokenLoader(tokens_spec(directory, {"ko": 1.0}), BATCH, rank=0, world_size=1, **fields)
        try:
            until = time.monotonic() + 60  # what is found beside the steps is found in a fraction of that
            while time.monotonic() < until:
                next(loader)
        finally:
            loader.close()
    assert caught.value.code == code and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["ko-train-00001.bin", "ko-train-00000.idx"])
@pytest.mark.parametrize("small", [True, False])
def test_a_flipped_byte_stops_the_run_and_names_the_file(
    own: Path, monkeypatch: pytest.MonkeyPatch, name: str, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(loading, "SMALL_BYTES", 0)
    path = own / "shards" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert name in refused(own)


def test_a_volume_that_fails_beside_the_training_stops_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, algorithm: str) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(loading, "SMALL_BYTES", 0)
    monkeypatch.setattr("trainer.data.manifest.checksum", fail)
    assert "cannot be read (Input/output error)" in refused(own, code=74)


@pytest.mark.parametrize("name", ["ko-train-00001.bin", "ko-train-00000.idx", "ko-heldout-00000.bin"])
def test_a_truncated_or_missing_file_is_refused(own: Path, name: str) -> None:
    path = own / "shards" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert name in refused(own)
    path.unlink()
    assert f"{name}: missing" in refused(own)


def test_another_tokenizer_is_refused(own: Path) -> None:
    write_manifest(own / "tokenizer", Manifest(kind="tokenizer", settings={"other": 1}, files=[]))
    assert "not the tokenizer that" in refused(own)


def test_a_damaged_tokenizer_is_refused_and_named(own: Path) -> None:
    directory = own / "tokenizer"
    (directory / "tokenizer.json").write_bytes(b"{}")
    tokenizer = Manifest(kind="tokenizer", files=[file_entry(directory, "tokenizer.json", "sha256")])
    write_manifest(directory, tokenizer)
    shards = read_manifest(own / "shards").model_copy(update={"inputs": {"tokenizer": tokenizer.digest}})
    write_manifest(own / "shards", shards)
    TokenLoader(tokens_spec(own, {"ko": 1.0}), BATCH, rank=0, world_size=1).close()
    (directory / "tokenizer.json").write_bytes(b"[]")
    assert "tokenizer.json: its content differs from the manifest's sha256" in refused(own)


def test_a_mix_that_the_shards_cannot_serve_is_refused(own: Path) -> None:
    spec = tokens_spec(own, {"ko": 0.5, "jp": 0.5})
    with pytest.raises(ForeseenError, match="has no source 'jp' of the mix; it has ko"):
        TokenLoader(spec, BATCH, rank=0, world_size=1)
    capped = spec.model_copy(update={"mix": {"ko": MixSpec(weight=1, max_epochs=2)}})
    with pytest.raises(ForeseenError, match="'ko' would need"):
        TokenLoader(capped, BATCH, rank=0, world_size=1, steps=1000)


def test_a_cursor_of_other_shards_is_refused(own: Path, spec: TokensSpec) -> None:
    (step,) = steps(1, spec)
    assert "other shards" in refused(own, cursor=step[0].cursor)


def test_a_missing_directory_says_which_step_makes_it(tmp_path: Path) -> None:
    assert "run the step that makes this directory" in refused(tmp_path / "nowhere")

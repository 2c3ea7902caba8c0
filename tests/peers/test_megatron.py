"""Token files exchanged with megatron-core in both directions. Runs in the peers' environment: `make test-peers`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.data.format import Shard, ShardWriter, token_dtype

# The first import of megatron-core takes minutes on a busy machine.
pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]
VOCABULARIES = [300, 65_499, 65_500, 65_535, 65_536, 65_537, 131_072]


def documents(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(vocab_size)
    made = [rng.integers(1, vocab_size, rng.integers(0, 50)).tolist() for _ in range(200)]
    return [[vocab_size - 1, 1, 2, 0], *([*document, 0] for document in made)]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_megatron_reads_ours(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    made = documents(vocab_size)
    with ShardWriter(tmp_path / "a", token_dtype(vocab_size)) as writer:
        for document in made:
            writer.append(np.array(document, writer.dtype), np.array([len(document)]))
    theirs = IndexedDataset(str(tmp_path / "a"))
    assert len(theirs) == len(made) and theirs.document_indices.tolist() == list(range(len(made) + 1))
    assert [theirs[n].tolist() for n in range(len(made))] == made
    assert theirs.get(0, offset=1, length=2).tolist() == [1, 2]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_we_read_megatrons_whatever_type_it_chose(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    made = documents(vocab_size)
    dtype = DType.optimal_dtype(vocab_size)  # int32 from 65,500 on, although uint16 suffices up to 65,536
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for document in made:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    ours = Shard(tmp_path / "a")
    assert ours.dtype == np.dtype(dtype)
    assert [ours.document(n).tolist() for n in range(len(ours))] == made


def test_files_are_equal_byte_for_byte_where_the_types_are(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    made = documents(32_768)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    with ShardWriter(tmp_path / "ours", np.dtype("uint16")) as writer:
        for document in made:
            builder.add_document(document, [len(document)])
            writer.append(np.array(document, writer.dtype), np.array([len(document)]))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()

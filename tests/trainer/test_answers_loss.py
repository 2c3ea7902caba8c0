"""Training and scoring with the loss on answers: the mean over a step's trained tokens, for every division of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import micro
import numpy as np
import pytest
import torch
from made_run import make_run

from trainer import evaluate, scoring
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpointer import load_model_weights
from trainer.data.answers import Answers
from trainer.data.format import Shard
from trainer.data.loader import IGNORED, StepBatch, TokenLoader
from trainer.data.tokenizer import Tokenizer
from trainer.kinds.ngrams import token_classes
from trainer.loop import train
from trainer.model.hybrid import HybridModel, build_model
from trainer.spec import MixSpec, TrainSpec

pytestmark = pytest.mark.usefixtures("quiet_checkpoint_library", "leave_no_traces")
CONSTANT = {"name": "constant"}
MTP = {"mtp": {"depth": 1, "layer": "*-"}}


def spec_of(data: Path, run_dir: Path, **changes: Any) -> TrainSpec:
    """A run on source ko alone."""
    spec = micro.micro_spec(data, run_dir, schedule=CONSTANT, **changes)
    mix = {"ko": MixSpec(weight=1.0, max_epochs=500)}
    return spec.model_copy(update={"tokens": spec.tokens.model_copy(update={"mix": mix})})


def model_of(spec: TrainSpec) -> HybridModel:
    """As training begins."""
    classes = token_classes(Path(spec.tokens.tokenizer) / "tokenizer.json")
    return build_model(spec.model, spec.backends, seed=spec.seed, token_classes=classes)


def first_step(spec: TrainSpec, micro_batch_rows: int = 8) -> StepBatch:
    batch = spec.batch.updated({"micro_batch_rows": micro_batch_rows})
    with TokenLoader(spec.tokens, batch, rank=0, world_size=1) as loader:
        return next(loader)


def answers_of(data: Path, split: str) -> dict[tuple[int, ...], list[list[int]]]:
    """The ranges of each document of source ko."""
    shard = Shard(data / "shards" / f"ko-{split}")
    answers = Answers(shard.prefix, len(shard))
    return {tuple(shard.document(n).tolist()): answers[n].tolist() for n in range(len(shard))}


def test_first_loss_and_gradient_norm_are_those_of_the_trained_tokens(answers_data: Path, tmp_path: Path) -> None:
    """Oracle: the logits of whole rows, softmax and sums in fp64, over labels looked up in the documents."""
    spec = spec_of(answers_data, tmp_path / "run", steps=1, model=MTP)
    assert train(spec) == 0
    model, (rows,) = model_of(spec), first_step(spec).micro_batches
    stream = rows.ids_BT.flatten().tolist()  # rows cut it wherever they end; the last document goes on
    documents, trained = answers_of(answers_data, "train"), list[bool]()
    while len(trained) < len(stream):
        rest = stream[len(trained) :]
        document = next(d for d in documents if list(d[: len(rest)]) == rest[: len(d)])
        trained += [n > 0 and any(a <= n < b for a, b in documents[document]) for n in range(len(document))]
        following = document
    following_one = following[len(stream) - len(trained)] if len(trained) > len(stream) else None
    targets = torch.tensor([*stream[1:], following_one if following_one is not None else 0])
    mask = torch.tensor([*trained[1 : len(stream)], trained[len(stream)] if following_one is not None else False])
    model.eval()
    logits_NV = model(rows.ids_BT, rows.seq_idx_BT).logits_BTV.flatten(0, 1).double()
    nats_N = -logits_NV.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = nats_N[mask].sum() / mask.sum()
    (line,) = micro.metrics(spec)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["trained_share"] == int(mask.sum()) / 256 and 0 < mask.sum() < 256
    model.train()
    output = model(rows.ids_BT, rows.seq_idx_BT, torch.where(mask, targets, IGNORED).view_as(rows.ids_BT))
    whole = output.ce_sum + spec.model.mtp_factor * output.mtp_ce_sum_K.sum()
    (whole / mask.sum() + output.aux_sum / 8).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_micro_batches_change_nothing_even_those_without_a_trained_token(answers_data: Path, tmp_path: Path) -> None:
    runs = []
    for size in (8, 2, 1):
        spec = spec_of(answers_data, tmp_path / str(size), steps=3, batch={"micro_batch_rows": size}, model=MTP)
        assert train(spec) == 0
        runs.append(micro.metrics(spec))
    alone = [int((m.labels_BT != IGNORED).sum()) for m in first_step(spec, 1).micro_batches]
    assert 0 in alone, "a micro-batch without a trained token is among them"
    for lines in runs[1:]:
        for line, whole in zip(lines, runs[0], strict=True):
            assert line["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert line["auxiliary"] == pytest.approx(whole["auxiliary"], rel=1e-5)
            assert line["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
            assert (line["trained_share"], line["tokens"]) == (whole["trained_share"], whole["tokens"])


def test_a_step_without_any_trained_token_changes_no_weight_and_is_no_divergence(tmp_path: Path) -> None:
    micro.make_data(tmp_path / "data", answers={"ko": 0})
    spec = spec_of(tmp_path / "data", tmp_path / "run", steps=12)
    assert train(spec) == 0, "12 steps in a row, of which 10 would end a run that diverges"
    lines = micro.metrics(spec)
    assert {(line["loss"], line["skipped"], line["grad_norm"]) for line in lines} == {(None, "no_answers", 0.0)}
    assert json.loads((Path(spec.run_dir) / "result.json").read_text())["loss"] is None
    before, after = model_of(spec), model_of(spec)
    assert load_model_weights(checkpoint.published(spec.run_dir)[0], after).step == 12
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name


def test_what_stands_before_a_document_in_its_row_changes_no_loss_of_it(answers_data: Path, tmp_path: Path) -> None:
    spec = spec_of(answers_data, tmp_path / "run")
    model, (rows,) = model_of(spec).eval(), first_step(spec).micro_batches
    first = rows.seq_idx_BT == 0
    other = torch.where(first, (rows.ids_BT + 17) % micro.VOCAB, rows.ids_BT)
    with torch.no_grad():
        ours, theirs = (
            torch.nn.functional.cross_entropy(
                model(ids, rows.seq_idx_BT).logits_BTV.transpose(1, 2), rows.labels_BT, reduction="none"
            )
            for ids in (rows.ids_BT, other)
        )
    behind, labelled = ~first, rows.labels_BT != IGNORED
    assert (behind & labelled).sum() > 10 and not torch.allclose(ours[first & labelled], theirs[first & labelled])
    torch.testing.assert_close(ours[behind], theirs[behind], rtol=1e-5, atol=1e-6)
    assert (ours[behind & ~labelled] == 0).all()


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSpec, HybridModel, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("scored")
    spec, model = make_run(directory, answers={"ko": 3}, evaluate={"max_tokens": 10_000})
    return directory / "data", spec, model, evaluate.run(spec)


def by_hand(data: Path, spec: TrainSpec, model: HybridModel, room: float = math.inf) -> tuple[float, int, int, int]:
    """Σ nats, tokens, bytes and documents of the answers of source ko, one window at a time."""
    tokenizer = Tokenizer.load(spec.tokens.tokenizer)
    nats, tokens, size, documents = 0.0, 0, 0, 0
    for ids, ranges in answers_of(data, "heldout").items():
        before = tokens
        for n in range(1, len(ids)):
            if not any(a <= n < b for a, b in ranges) or tokens == room:
                continue
            start = (n - 1) // spec.tokens.seq_len * spec.tokens.seq_len
            context = torch.tensor([ids[start:n]])
            with torch.no_grad():
                logits_V = model(context, torch.zeros_like(context, dtype=torch.int32)).logits_BTV[0, -1].double()
            nats -= logits_V.log_softmax(-1)[ids[n]].item()
            tokens += 1
            size += 0 if ids[n] == tokenizer.eod_id else len(tokenizer.decode_bytes([ids[n]]))
        documents += tokens > before
    return nats, tokens, size, documents


def test_held_out_answers_are_scored_with_all_before_them_as_context(scored: Any) -> None:
    data, spec, model, result = scored
    nats, tokens, size, documents = by_hand(data, spec, model)
    found = result["sources"]["ko"]
    assert (found["tokens"], found["bytes"], found["documents"], found["scored"]) == (
        tokens,
        size,
        documents,
        "answers",
    )
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert "scored" not in result["sources"]["en"]
    report = (Path(spec.run_dir) / "report.html").read_text(encoding="utf-8")
    assert "In ko, only the answers are scored." in report


def test_a_budget_counts_scored_tokens(scored: Any) -> None:
    data, spec, model, _ = scored
    found = evaluate.run(spec.updated({"evaluate": {"max_tokens": 46}}))["sources"]["ko"]  # ko and en share it
    nats, tokens, size, documents = by_hand(data, spec, model, room=23)
    assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, size, documents) and tokens == 23
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_labels_of_a_cut_document_end_with_its_last_scored_token() -> None:
    document, ranges = np.arange(10, 20), np.array([[0, 2], [5, 8]], np.uint32)
    for room, (end, labels) in {
        1: (2, [11]),
        2: (6, [11, -100, -100, -100, 15]),
        9: (8, [11, -100, -100, -100, 15, 16, 17]),
    }.items():
        ids, found = scoring.labelled(document, ranges, room)
        assert (ids.tolist(), found.tolist()) == (list(range(10, 10 + end)), labels)
    assert scoring.labelled(document, np.empty((0, 2), np.uint32), 3)[1].tolist() == []

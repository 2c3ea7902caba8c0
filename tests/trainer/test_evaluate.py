"""Bits per byte against a plain per-window computation and against closed forms; packing against its definition."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_run import make_model, make_run, save_checkpoint

from trainer import evaluate, scoring
from trainer.data.loader import IGNORED, heldout_documents
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ForeseenError
from trainer.fields import stored
from trainer.specbase import SpecError

EVALUATE = {"max_tokens": 100_000, "prompts": ["river", "다리 강물"], "sample_tokens": 6, "temperature": 0.7}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(spec, model in its checkpoint, result of evaluating it)."""
    spec, model = make_run(tmp_path_factory.mktemp("evaluate"), evaluate=EVALUATE)
    return spec, model, evaluate.run(spec)


def score_by_hand(spec, model, source):
    """Σ nats and bytes of a source, one window at a time, through logits and decoded text."""
    tokenizer = Tokenizer.load(spec.tokens.tokenizer)
    nats, tokens, size = 0.0, 0, 0
    for name, _, document, _ in heldout_documents(spec.tokens):
        if name != source:
            continue
        ids = document.astype(np.int64).tolist()
        # an id that is a part of a character has no text of its own, so count through its neighbours
        size += len(tokenizer.decode(ids[:-1]).encode()) - tokenizer.byte_lengths()[ids[0]]
        for first in range(0, len(ids) - 1, spec.tokens.seq_len):
            window = torch.tensor(ids[first : first + spec.tokens.seq_len + 1])
            with torch.no_grad():
                logits = model(window[None, :-1], torch.zeros(1, len(window) - 1, dtype=torch.int32)).logits_BTV[0]
            nats -= logits.double().log_softmax(-1).gather(1, window[1:, None]).sum().item()
            tokens += len(window) - 1
    return nats, tokens, size


def test_equals_one_window_at_a_time(run):
    spec, model, result = run
    sums = np.zeros(3)
    for source in spec.tokens.mix:
        nats, tokens, size = score_by_hand(spec, model, source)
        got = result["sources"][source]
        assert (got["tokens"], got["bytes"], got["documents"]) == (tokens, size, 10)
        assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert got["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert got["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        sums += (nats, tokens, size)
    # both sources of the micro corpus are of one domain
    assert list(result["domains"]) == ["en"]
    assert result["domains"]["en"] == result["all"]
    assert result["all"]["bits_per_byte"] == pytest.approx(sums[0] / math.log(2) / sums[2], rel=1e-5)


def test_writes_what_it_returns(run):
    spec, _, result = run
    assert json.loads((Path(spec.run_dir) / "eval.json").read_text(encoding="utf-8")) == result
    assert result["step"] == 12
    assert result["settings"] == stored(spec.evaluate)
    assert [sample["prompt"] for sample in result["samples"]] == EVALUATE["prompts"]
    assert (Path(spec.run_dir) / "report.html").stat().st_size > 1000
    assert not list(Path(spec.run_dir).glob("*.tmp"))


def test_eval_json_comes_last_and_the_report_already_shows_it(tmp_path, monkeypatch):
    spec, _ = make_run(tmp_path, evaluate={"max_tokens": 50})

    def killed(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.gate, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(spec)
    assert not (Path(spec.run_dir) / "eval.json").exists()
    assert "bits per byte, all domains" in (Path(spec.run_dir) / "report.html").read_text(encoding="utf-8")


def test_is_repeatable(run):
    spec, _, result = run
    again = evaluate.run(spec)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_uniform_model_has_the_bits_of_the_vocabulary(tmp_path):
    """A head of zeros gives every token probability 1/V, whatever else the model does."""
    spec, _ = make_run(tmp_path)
    model = make_model(spec)
    torch.nn.init.zeros_(model.head.weight)
    save_checkpoint(spec, model, 16)
    result = evaluate.run(spec)
    for score in (*result["sources"].values(), result["all"]):
        assert score["loss"] == pytest.approx(math.log(320), rel=1e-6)
        assert score["bits_per_byte"] == pytest.approx(score["tokens"] * math.log2(320) / score["bytes"], rel=1e-6)


def test_max_tokens_is_kept_and_shared_by_weight(tmp_path):
    mix = {"ko": {"weight": 0.75, "max_epochs": 50}, "en": {"weight": 0.25, "max_epochs": 50}}
    spec, _ = make_run(tmp_path, evaluate={"max_tokens": 100}, tokens={"mix": mix})
    result = evaluate.run(spec)
    assert {name: score["tokens"] for name, score in result["sources"].items()} == {"ko": 75, "en": 25}
    assert result["all"]["tokens"] == 100


def test_windows_have_the_rows_of_the_last_step(tmp_path, monkeypatch):
    """12 steps of 256 tokens, 100 of the stream skipped: the last one begins at 2916, where a stage may begin too."""
    made = []
    pack = scoring.pack
    monkeypatch.setattr(scoring, "pack", lambda ids, seq_len, rows: made.append(seq_len) or pack(ids, seq_len, rows))
    spec, _ = make_run(tmp_path, evaluate={"max_tokens": 50})
    assert (spec.steps, spec.batch.tokens_per_step) == (12, 256)
    for first, length in ((2915, 16), (2916, 16), (2917, 32), (3172, 32)):
        stage = {"from_tokens": first, "seq_len": 16}
        made.clear()
        evaluate.run(spec.updated({"tokens": {"curriculum": [stage], "skip": [[500, 600]]}}))
        assert set(made) == {length}, first


def test_nothing_is_read_after_the_budget(tmp_path, monkeypatch):
    read = []

    class Document:
        def __init__(self, ids):
            self.ids = ids

        def __getitem__(self, part):
            read.append(part)
            return self.ids[part]

    spec, _ = make_run(tmp_path, evaluate={"max_tokens": 100})
    found = ((name, domain, Document(ids), None) for name, domain, ids, _ in heldout_documents(spec.tokens))
    monkeypatch.setattr(scoring, "heldout_documents", lambda tokens: found)
    scores = evaluate.run(spec)["sources"].values()
    assert len(read) == sum(score["documents"] for score in scores) < 20


def test_bytes_of_tokens_are_the_bytes_of_text(run):
    spec, _, _ = run
    tokenizer = Tokenizer.load(spec.tokens.tokenizer)
    lengths = tokenizer.byte_lengths()
    for text in ("river 다리", "한글과 漢字, emoji 🙂", "\tx = 1\n", "<|endoftext|>"):
        assert sum(lengths[n] for n in tokenizer.encode(text)) == len(text.encode())
    assert lengths[tokenizer.eod_id] == 0


def test_no_checkpoint_is_one_clear_line(tmp_path):
    spec, _ = make_run(tmp_path)
    with pytest.raises(ForeseenError, match="no checkpoint yet; train first") as caught:
        evaluate.run(spec.updated({"run_dir": str(tmp_path / "other")}))
    assert caught.value.code == 69


def test_shards_that_cannot_be_used_are_bad_data(tmp_path):
    spec, _ = make_run(tmp_path)
    mix = {"ko": {"weight": 0.25}, "en": {"weight": 0.25}, "other": {"weight": 0.5}}
    cases = {
        "has no source 'other' of the mix; it has en, ko": spec.updated({"tokens": {"mix": mix}}),
        "manifest.json: not there": spec.updated({"tokens": {"shards": str(tmp_path / "nowhere")}}),
    }
    for message, changed in cases.items():
        with pytest.raises(ForeseenError, match=message) as caught:
            evaluate.run(changed)
        assert caught.value.code == 65
    (Path(spec.tokens.shards) / "manifest.json").write_text("{}")
    with pytest.raises(ForeseenError, match="not a manifest") as caught:
        evaluate.run(spec)
    assert caught.value.code == 65


def test_an_empty_prompt_is_refused(run):
    with pytest.raises(SpecError, match=r"evaluate\.prompts\.1"):
        run[0].updated({"evaluate": {"prompts": ["river", ""]}})


def test_precision_that_cannot_run_is_a_spec_error(run, monkeypatch):
    monkeypatch.setattr(evaluate, "device_capability", lambda device: (7, 5))
    with pytest.raises(ForeseenError, match=r"bf16 needs 8\.0") as caught:
        evaluate.run(run[0].updated({"precision": {"dtype": "bf16"}}))
    assert caught.value.code == 2


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    seq_len=st.integers(1, 12),
    num_rows=st.integers(1, 3),
)
def test_packing_scores_every_token_once_in_its_own_window(lengths, seq_len, num_rows):
    documents, expected, start = [], [], 0
    for length in lengths:
        ids = np.arange(start, start + length)
        documents.append((ids, ids[1:]))
        start += length
        for i in range(1, length):
            window_start = ids[0] + (i - 1) // seq_len * seq_len
            expected.append((tuple(range(window_start, ids[i])), ids[i]))
    found = []
    for batch in scoring.pack(documents, seq_len, num_rows):
        assert batch.ids_BT.shape[1] == seq_len and 1 <= batch.ids_BT.shape[0] <= num_rows
        for ids, labels, seq_idx in zip(batch.ids_BT, batch.labels_BT, batch.seq_idx_BT, strict=True):
            assert (seq_idx.diff() >= 0).all()
            for t in range(seq_len):
                if labels[t] != IGNORED:
                    context = ids[: t + 1][seq_idx[: t + 1] == seq_idx[t]]
                    found.append((tuple(context.tolist()), labels[t].item()))
    assert sorted(found) == sorted(expected)

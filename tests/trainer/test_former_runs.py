"""Runs and exports of earlier versions still load: they are resumed, evaluated, exported and read."""

from __future__ import annotations

import json
from pathlib import Path

import former
import pytest
import torch

from trainer import evaluate, export
from trainer.begin import begun_with
from trainer.checkpoints import checkpoint
from trainer.generate import complete
from trainer.loop import train
from trainer.pretrained import tokenizer_of
from trainer.report.run import read_run
from trainer.spec import TrainSpec
from trainer.specbase import parse, read_yaml
from trainer.trained import load_trained

# With the instruction sets default, avx2 and avx512 losses differ by 2.5e-7 at most; another token or rate by 1e-2.
CLOSE = 1e-4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return former.unpack(tmp_path)


def spec_of(run: Path, **changes: object) -> TrainSpec:
    value = read_yaml(run / "train.yaml") | changes
    value["runtime"] |= {"metrics_port": 0, "device": "cpu"}
    return parse(TrainSpec, value)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("leave_no_traces", "quiet_checkpoint_library")
def test_a_run_is_resumed_with_the_losses_that_it_had(run: Path):
    recorded = lines(run)
    (run / "checkpoints" / "LATEST").write_text("step-00000004\n")
    assert train(spec_of(run)) == 0
    again = lines(run)
    assert [line["step"] for line in again] == list(range(1, 9))
    for name in ("learning_rate", "tokens", "by_source"):
        assert [line[name] for line in again] == [line[name] for line in recorded]
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in recorded], rel=0, abs=CLOSE)
    assert again[:4] == recorded[:4] and again[4:] != recorded[4:], "steps 5 to 8 were trained anew"


def test_a_run_is_evaluated_and_exported(run: Path):
    recorded = json.loads((run / "eval.json").read_text())
    (run / "eval.json").unlink()
    spec = spec_of(run)
    result = evaluate.run(spec)
    for domain, value in recorded["domains"].items():
        assert result["domains"][domain]["bits_per_byte"] == pytest.approx(value["bits_per_byte"], abs=CLOSE)
    before = json.loads((run / "export" / "manifest.json").read_text())
    after = export.run(spec)
    for name in ("checkpoint_digest", "data", "step", "parameters"):
        assert after[name] == before[name]
    assert after["sha256"]["model.safetensors"] == before["sha256"]["model.safetensors"]


def test_an_export_is_loaded_and_writes(run: Path):
    model, tokenizer = export.load(run / "export")
    assert tokenizer.vocab_size == 384
    (text,) = complete(model, tokenizer, ["the river"], max_tokens=4, temperature=0.0, seed=0)
    assert isinstance(text, str) and text


def test_checkpoints_verify_and_the_report_is_read(run: Path):
    assert [checkpoint.verify(path).step for path in checkpoint.published(run)] == [8, 4]
    found = read_run(run)
    assert found.evaluation is not None and found.spec.run == former.RUN


def test_a_new_run_begins_with_them(run: Path):
    wanted = load_trained(spec_of(run), torch.device("cpu")).model.state_dict()
    for source in (run, run / "checkpoints" / "step-00000008", run / "export"):
        model = begun_with(spec_of(run, init_from=str(source)), torch.device("cpu"), None)
        assert model is not None
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items()), source
        assert (tokenizer_of(source) / "tokenizer.json").read_bytes() == (
            run / "export" / "tokenizer.json"
        ).read_bytes()

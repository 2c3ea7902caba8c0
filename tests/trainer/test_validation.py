"""Validation during training: the numbers are those of the task evaluate, and training does not notice it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import micro
import parallel_ranks
import pytest
import torch
from prometheus_client import generate_latest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import evaluate, validation
from trainer import prepare as preparing
from trainer.checkpoints import checkpoint
from trainer.data.manifest import read_manifest, write_manifest
from trainer.errors import DataError, SpecError
from trainer.loop import train
from trainer.recording.exporter import Metrics
from trainer.recording.recorder import Recorder
from trainer.spec import TrainSpec
from trainer.trained import load_trained

pytestmark = pytest.mark.usefixtures("quiet_checkpoint_library", "leave_no_traces")

EVERY = {"every_steps": 2, "every_max_tokens": 400, "prompts": ["river"], "sample_tokens": 4}
RATES = {"muon": {"learning_rate": 1e-4}, "adamw": {"learning_rate": 1e-4}}  # rounding stays rounding
SAME = ("loss", "auxiliary", "grad_norm", "expert_load_max_ratio", "tokens", "by_source")


def lines_of(spec: TrainSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(spec.run_dir) / "validation.jsonl").read_text().splitlines()]


def trained_on(spec: TrainSpec) -> list[dict[str, Any]]:
    """What training has computed in each step."""
    return [{name: line[name] for name in SAME} for line in micro.metrics(spec)]


def test_training_is_the_same_to_the_bit_and_the_numbers_are_shown(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With state that a forward pass could move: delayed FP8 scales, router biases, the random state."""
    pages: list[str] = []
    beats: list[str] = []
    beat = Recorder.beat
    monkeypatch.setattr(Recorder, "beat", lambda self: (beats.append(self.doing()), beat(self)))
    monkeypatch.setattr(Metrics, "close", lambda self: pages.append(generate_latest(self.registry).decode()))
    fp8 = {"recipe": "delayed", "implementation": "emulated", "bf16_end_layers": 0}
    changes: dict[str, Any] = {
        "steps": 5,
        "precision": {"dtype": "fp8", "fp8": fp8},
        "model": {"mtp": {"depth": 1, "layer": "*E"}},
        "runtime": {"activation_checkpointing": "selective"},
    }
    plain = micro.micro_spec(micro_data, tmp_path / "plain", **changes)
    watched = micro.micro_spec(micro_data, tmp_path / "watched", evaluate=EVERY, **changes)
    states = []
    for spec in (plain, watched):
        assert train(spec) == 0
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert trained_on(watched) == trained_on(plain)
    one, other = (checkpoint.read_manifest(checkpoint.step_dir(spec.run_dir, 5)) for spec in (plain, watched))
    assert one.cursor == other.cursor
    models = [load_trained(spec, torch.device("cpu")).model.state_dict() for spec in (plain, watched)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert not (tmp_path / "plain" / "validation.jsonl").exists()

    assert {each for each in beats if "validation" in each} == {f"validation of step {n}" for n in (2, 4, 5)}
    lines = lines_of(watched)
    assert [(line["step"], line["tokens"]) for line in lines] == [(2, 512), (4, 1024), (5, 1280)]
    score = lines[-1]["domains"]["en"]
    assert lines[0]["domains"]["en"]["loss"] > score["loss"]
    assert f'yaongi_validation_bits_per_byte{{domain="en"}} {score["bits_per_byte"]}' in pages[1]
    assert "yaongi_validation_bits_per_byte{" not in pages[0]
    spent = next(line for line in pages[1].splitlines() if 'goodput_seconds_total{class="validation"}' in line)
    assert float(spent.split()[-1]) >= sum(line["seconds"] for line in lines) - 0.01
    board = EventAccumulator(str(tmp_path / "watched" / "tb")).Reload()
    points = board.Scalars("validation/bits_per_byte/en")
    assert [point.step for point in points] == [2, 4, 5]
    assert points[-1].value == pytest.approx(score["bits_per_byte"], rel=1e-5)


def test_the_last_numbers_are_those_of_evaluate_and_a_resumed_run_replaces_what_came_after(
    micro_data: Path, tmp_path: Path
):
    """Its rows become shorter on the way, as those of the training."""
    spec = micro.micro_spec(
        micro_data,
        tmp_path / "run",
        steps=4,
        schedule={"name": "constant"},
        evaluate=EVERY,
        tokens={"curriculum": [{"from_tokens": 1024, "seq_len": 16}]},
    )
    assert train(spec) == 0
    file = Path(spec.run_dir) / "validation.jsonl"
    first = file.read_text()
    later = {"step": 5, "tokens": 0, "domains": {}, "samples": [], "seconds": 1.0}
    file.write_text(first + json.dumps(later) + '\n{"step": 6, "tok')  # of a process that was killed
    assert train(spec.updated({"steps": 6})) == 0
    assert file.read_text().startswith(first)
    assert [line["step"] for line in lines_of(spec)] == [2, 4, 6]
    last = lines_of(spec)[2]
    result = evaluate.run(spec.updated({"steps": 6, "evaluate": {"max_tokens": EVERY["every_max_tokens"]}}))
    score = result["domains"]["en"]
    assert last["domains"]["en"] == {
        "bits_per_byte": pytest.approx(score["bits_per_byte"], rel=1e-6),
        "loss": pytest.approx(score["loss"], rel=1e-6),
        "tokens": 400,
        "bytes": score["bytes"],
    }
    assert last["samples"] == result["samples"], "the same model, prompt and seed"


def test_ranks_together_measure_what_one_measures_and_train_as_without(micro_data: Path, tmp_path: Path):
    """Three batches on two ranks: the second rank's last one is empty."""
    model = {"layers": ["ME", "N", "*-", "E"], "mtp": {"depth": 1, "layer": "*E"}}
    layouts: dict[str, dict[str, Any]] = {
        "ddp": {"parallel": {"data": "ddp"}},
        "cut": {"parallel": {"data": "fsdp", "expert": 2}},
    }
    watched = {**EVERY, "every_max_tokens": 150}
    fixed: dict[str, Any] = {"steps": 3, "model": model, "optimizer": RATES}
    alone = micro.micro_spec(micro_data, tmp_path / "alone", evaluate=watched, **fixed)
    specs = {
        (layout, on): micro.micro_spec(
            micro_data, tmp_path / f"{layout}-{on}", evaluate=watched if on else {}, **fixed, **changes
        )
        for layout, changes in layouts.items()
        for on in (False, True)
    }
    parallel_ranks.run(list(specs.values()), 2, tmp_path)
    parallel_ranks.run([alone], 1, tmp_path)
    for layout in layouts:
        spec = specs[layout, True]
        assert trained_on(spec) == trained_on(specs[layout, False]), layout
        for line, expected in zip(lines_of(spec), lines_of(alone), strict=True):
            assert line["step"] == expected["step"]
            assert line["domains"]["en"] == pytest.approx(expected["domains"]["en"], rel=1e-5), layout
            assert len(line["samples"]) == (layout == "ddp"), "only where a rank holds the whole model"


def test_validation_compiles_nothing_and_does_without_samples_that_do_not_fit(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    graphs: list[bool] = []
    complete = validation.complete

    def complete_at_first(*arguments: Any, **options: Any) -> list[str]:
        monkeypatch.setattr(validation, "complete", too_large)
        return complete(*arguments, **options)

    def too_large(*_: Any, **__: Any) -> list[str]:
        raise SpecError("1 texts need 9 MiB and 1 MiB are free")

    monkeypatch.setattr(validation, "complete", complete_at_first)

    def backend(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(preparing, "compile_layers", partial(preparing.compile_layers, backend=backend))
    monkeypatch.setattr(preparing.compiled, "agreed", lambda *_: True)
    model = {"layers": ["*-"], "engram": []}
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=3, model=model, evaluate={**EVERY, "every_steps": 1})
    assert train(spec) == 0
    torch._dynamo.reset()
    assert [len(line["samples"]) for line in lines_of(spec)] == [1, 0, 0]
    assert graphs == [True], "the layer in training, once"


def test_missing_held_out_text_is_said_before_the_first_step(micro_data: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(micro_data, data)
    manifest = read_manifest(data / "shards")
    files = [file for file in manifest.files if file.split == "train" or file.source == "en"]
    write_manifest(data / "shards", manifest.model_copy(update={"files": files}))
    spec = micro.micro_spec(data, tmp_path / "run", evaluate=EVERY)
    with pytest.raises(DataError, match=r"no held-out text of source 'ko' .*train\.evaluate\.every_max_tokens"):
        train(spec)
    assert not checkpoint.published(spec.run_dir) and micro.metrics(spec) == []

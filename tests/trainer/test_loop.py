"""The training loop in this process, with one rank: what it computes, writes and refuses."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro
import pytest
import torch
import torch.distributed as dist
from prometheus_client import generate_latest
from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - imported here so that no test's time contains it

from trainer import distributed, evaluate, export, preflight
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpoint import CheckpointManifest
from trainer.checkpoints.checkpointer import Checkpointer, load_model_weights
from trainer.data.loader import TokenLoader
from trainer.errors import ForeseenError
from trainer.exitcodes import ExitCode
from trainer.kinds.ngrams import token_classes
from trainer.loop import step_record, train
from trainer.model.hybrid import build_model
from trainer.optim import Optimizers
from trainer.outcome import Totals, Update, read
from trainer.process import failures, limits
from trainer.process.restarts import NodeRecord
from trainer.recording.exporter import Metrics
from trainer.recording.metrics import METRICS
from trainer.spec import TrainSpec
from trainer.specbase import SpecError

CONSTANT = {"name": "constant"}  # a rate that does not depend on the length, which a run may then change
pytestmark = pytest.mark.usefixtures("quiet_checkpoint_library", "leave_no_traces")


def test_first_loss_and_gradient_norm_are_those_of_the_whole_step(micro_data: Path, tmp_path: Path):
    """Oracle: one backward of the mean loss over all rows at once, without micro-batches, loop or DDP."""
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=1, schedule=CONSTANT)
    assert train(spec) == 0
    classes = token_classes(micro_data / "tokenizer" / "tokenizer.json")
    model = build_model(spec.model, spec.backends, seed=spec.seed, token_classes=classes)
    whole = spec.batch.updated({"micro_batch_rows": 8})
    with TokenLoader(spec.tokens, whole, rank=0, world_size=1) as loader:
        batch = next(loader)
    (rows,) = batch.micro_batches
    output = model(rows.ids_BT, rows.seq_idx_BT, rows.labels_BT)
    labels = int((rows.labels_BT != -100).sum())
    (output.ce_sum / labels + output.aux_sum / 8).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    (line,) = micro.metrics(spec)
    assert line["loss"] == pytest.approx(output.ce_sum.item() / labels, rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert line["expert_load_max_ratio"] >= 1
    assert line["tokens"] == sum(line["by_source"].values()) == 256


def test_outputs_of_a_finished_run(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=10, checkpoint={"keep_last": 1})
    assert train(spec) == 0
    run_dir = Path(spec.run_dir)
    lines = micro.metrics(spec)
    assert [line["step"] for line in lines] == list(range(1, 11))
    result = json.loads((run_dir / "result.json").read_text())
    assert result["loss_last"] == lines[-1]["loss"] < lines[0]["loss"] == result["loss_first"]
    kept = [path.name for path in checkpoint.published(run_dir)]
    assert kept == ["step-00000010", "step-00000008"], "keep_last is 1, and the last before the decay stays"
    assert result["checkpoint_digest"] == checkpoint.verify(result["checkpoint"]).digest
    assert list((run_dir / "tb").glob("events.*"))
    assert (run_dir / "train.yaml").exists()
    model = build_model(spec.model, seed=99, token_classes=token_classes(micro_data / "tokenizer" / "tokenizer.json"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_model_weights(result["checkpoint"], model).step == 10
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert "embedding.weight" in changed and any(name.endswith("bias_E") for name in changed)


def test_finished_run_has_nothing_left_to_do(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=2)
    assert train(spec) == 0
    first = (Path(spec.run_dir) / "logs" / "metrics.jsonl").read_bytes()
    assert train(spec) == 0
    assert (Path(spec.run_dir) / "logs" / "metrics.jsonl").read_bytes() == first
    result = Path(spec.run_dir) / "result.json"
    before = json.loads(result.read_text())
    (Path(spec.run_dir) / "logs" / "metrics.jsonl").unlink()
    assert train(spec) == 0
    after = json.loads(result.read_text())
    assert (after["loss_first"], after["loss_last"]) == (None, None), "only metrics.jsonl has known them"
    for name in ("steps", "tokens", "checkpoint_digest"):
        assert after[name] == before[name]


def test_tokens_are_counted_when_the_step_grows_on_the_way(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=2, schedule=CONSTANT)
    assert train(spec) == 0
    size = spec.batch.tokens_per_step
    longer: TrainSpec = spec.updated({"batch": {"tokens_per_step": 2 * size}, "steps": 4})
    assert train(longer) == 0
    assert [line["tokens"] for line in micro.metrics(longer)] == [size, 2 * size, 4 * size, 6 * size]
    result = json.loads((Path(spec.run_dir) / "result.json").read_text())
    assert result["tokens"] == 6 * size


def test_gradients_that_stay_infinite_end_the_run_with_70(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from trainer.model import hybrid

    plain = hybrid.cross_entropy_sum
    monkeypatch.setattr(hybrid, "cross_entropy_sum", lambda *tensors: plain(*tensors) * float("inf"))
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=30, checkpoint={"every_steps": 30})
    with pytest.raises(ForeseenError) as error:
        train(spec)
    assert error.value.code == ExitCode.DIVERGED
    assert "10 steps in a row" in str(error.value) and "\n" not in str(error.value)
    lines = micro.metrics(spec)
    assert len(lines) == 9 and all(line["skipped"] == "nonfinite" and line["loss"] is None for line in lines)


@pytest.mark.parametrize("where", ["weight", "optimizer state"])
def test_weights_that_are_not_finite_are_never_published(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """An update at step 6 breaks an expert without tokens, so that it does not show in losses or gradients."""
    plain, calls = Optimizers.step, []

    def breaking(optimizers: Optimizers, skip: torch.Tensor) -> None:
        plain(optimizers, skip)
        calls.append(1)
        if len(calls) == 6:
            weight = next(each for each in optimizers.parameters if each.dim() == 3)
            state = next(v for k, v in optimizers.state_dict().items() if v.is_floating_point() and v.dim() == 3)
            (weight.data if where == "weight" else state)[0, 0, 0] = torch.nan

    monkeypatch.setattr(Optimizers, "step", breaking)
    monkeypatch.setattr(Optimizers, "zero_grad", lambda optimizers: None)
    finite = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.bool)
    monkeypatch.setattr("trainer.loop.clip_gradients", lambda *_: finite)
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=9, checkpoint={"every_steps": 2, "keep_last": 1})
    with pytest.raises(ForeseenError, match="is not finite after step 6") as error:
        train(spec)
    assert error.value.code == ExitCode.DIVERGED and "\n" not in str(error.value)
    assert "step-00000004" in str(error.value) and str(Path(spec.run_dir) / "checkpoints" / "LATEST") in str(
        error.value
    )
    assert [path.name for path in checkpoint.published(spec.run_dir)] == ["step-00000004"]
    checkpoint.verify(checkpoint.step_dir(spec.run_dir, 4))


def test_row_of_skipped_steps_leaves_the_way_back_and_names_it(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from trainer.model import hybrid

    plain, calls = hybrid.cross_entropy_sum, []

    def overflowing(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(*tensors) * (float("inf") if len(calls) > 7 * 4 else 1)  # 4 micro-batches a step

    monkeypatch.setattr(hybrid, "cross_entropy_sum", overflowing)
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=30, checkpoint={"every_steps": 3, "keep_last": 2})
    with pytest.raises(ForeseenError, match="10 steps in a row") as error:
        train(spec)
    assert error.value.code == ExitCode.DIVERGED and "step-00000006" in str(error.value)
    kept = [int(path.name[-8:]) for path in checkpoint.published(spec.run_dir)]
    assert kept == [15, 6, 3], "steps 8 to 17 are skipped; 9 and 12 were made among them as 15 was"


def test_run_does_not_go_on_from_broken_weights(micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint of an earlier version, which did not check weights."""
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=4, checkpoint={"every_steps": 2}, schedule=CONSTANT)
    plain, calls = Optimizers.step, []

    def breaking(optimizers: Optimizers, skip: torch.Tensor) -> None:
        plain(optimizers, skip)
        calls.append(1)
        if len(calls) == 3:
            optimizers.parameters[0].data.flatten()[0] = torch.inf

    with monkeypatch.context() as earlier:
        earlier.setattr(Optimizers, "step", breaking)
        earlier.setattr(Checkpointer, "_not_finite", lambda *_: None)
        assert train(spec) == 0
    for command in (lambda: train(spec.updated({"steps": 6})), lambda: evaluate.run(spec), lambda: export.run(spec)):
        with pytest.raises(ForeseenError, match=r"step-00000004: model.* is not finite; .*step-00000002") as error:
            command()
        assert error.value.code == ExitCode.DIVERGED and "\n" not in str(error.value)
        if dist.is_initialized():
            dist.destroy_process_group()
    assert not (tmp_path / "run" / "eval.json").exists() and not (tmp_path / "run" / "export").exists()


def test_a_limit_that_the_entrypoint_tells_of_saves_and_stops_with_75(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = micro.micro_spec(micro_data, tmp_path / "run")
    start = distributed.start

    def stopped_at_once(*arguments: Any) -> distributed.World:
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments)

    monkeypatch.setenv(failures.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(distributed, "start", stopped_at_once)
    limits.tell(tmp_path, "the deadline has passed")
    assert train(spec) == ExitCode.LIMIT
    assert checkpoint.latest_step(spec.run_dir) == 1, "the step it stopped at is saved"
    (tmp_path / limits.TOLD).unlink()
    assert train(spec) == ExitCode.TERMINATED
    assert checkpoint.latest_step(spec.run_dir) == 2
    monkeypatch.undo()
    assert train(spec) == 0


def test_other_data_or_another_model_is_refused(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=1, schedule=CONSTANT)
    assert train(spec) == 0
    wider: TrainSpec = spec.updated({"model": {"mlp": {"width": 64}}, "steps": 2})
    with pytest.raises(
        ForeseenError, match=r"train\.model\.mlp\.width is 32 there and 64 .*use the same model"
    ) as error:
        train(wider)
    assert error.value.code == ExitCode.SPEC
    dist.destroy_process_group()
    plain: TrainSpec = spec.updated({"optimizer": {"name": "adamw"}, "steps": 2})
    with pytest.raises(ForeseenError, match=r"state of optimizer muon, train\.optimizer\.name is adamw") as error:
        train(plain)
    assert error.value.code == ExitCode.SPEC and "\n" not in str(error.value)
    dist.destroy_process_group()
    micro.make_data(tmp_path / "other", seed=8)
    other = micro.micro_spec(tmp_path / "other", tmp_path / "run", steps=2, schedule=CONSTANT)
    with pytest.raises(ForeseenError, match="use the same data") as error:
        train(other)
    assert error.value.code == ExitCode.DATA


def test_spec_that_this_machine_cannot_run_is_a_spec_error(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", precision={"dtype": "fp8"})
    with pytest.raises(SpecError, match=r"no implementation is known to work here.*write bf16"):
        train(spec)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_save_on_a_full_disk_leaves_the_older_checkpoint_and_training_goes_on(
    micro_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asynchronous: bool,
):
    """A limit on file sizes simulates a full disk: the write itself fails, halfway through a file."""
    plain = Checkpointer._write
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_full_disk(self: Checkpointer, manifest: CheckpointManifest, *rest: Any) -> str | None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited[1]) if manifest.step == 8 else unlimited)
        try:
            return plain(self, manifest, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    pages: list[str] = []
    monkeypatch.setattr(Metrics, "close", lambda self: pages.append(generate_latest(self.registry).decode()))
    monkeypatch.setattr(Checkpointer, "_write", on_full_disk)
    options = {"keep_last": 5, "asynchronous": asynchronous}
    spec = micro.micro_spec(micro_data, tmp_path / "run", checkpoint=options)
    with caplog.at_level(logging.ERROR, logger="trainer"):
        assert train(spec) == 0
    assert "checkpoint of step 8 was not saved" in caplog.text and "GiB free" in caplog.text
    assert "yaongi_checkpoint_failures_total 1.0" in pages[0]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["LATEST", "step-00000004", "step-00000012"]
    last = micro.micro_spec(micro_data, tmp_path / "run8", steps=8, checkpoint=options)
    with pytest.raises(ForeseenError, match=r"step 8 was not saved: .*; free space") as error:
        train(last)
    assert error.value.code == ExitCode.VOLUME


def test_every_metric_of_the_table_is_exported(micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pages: list[str] = []
    monkeypatch.setattr(Metrics, "close", lambda self: pages.append(generate_latest(self.registry).decode()))
    fp8 = {"recipe": "delayed", "implementation": "emulated", "bf16_end_layers": 0}
    spec = micro.micro_spec(
        micro_data,
        tmp_path / "run",
        steps=3,
        precision={"dtype": "fp8", "fp8": fp8},
        runtime={"log_every_steps": 1},
        evaluate={"every_steps": 3, "every_max_tokens": 100},
    )
    Path(spec.run_dir).mkdir()
    nodes = {"pod": NodeRecord(total=2, reasons={"killed": 2})}
    (tmp_path / "run" / "restarts.json").write_text(json.dumps({"nodes": {k: vars(v) for k, v in nodes.items()}}))
    monkeypatch.setenv(preflight.VARIABLE, "")
    preflight.of_node(spec)  # as the entrypoint does
    assert train(spec) == 0
    (page,) = pages
    lines = [line for line in page.splitlines() if not line.startswith("#")]
    exported = {metric.name for metric in METRICS if any(line.startswith(f"yaongi_{metric.name}") for line in lines)}
    of_gpus = {"mfu_ratio", "proof_result", "proof_seconds", "trial_seconds"}
    assert exported == {metric.name for metric in METRICS if "trainer" in metric.processes} - of_gpus
    assert 'yaongi_restarts_total{reason="killed"} 2.0' in lines
    assert "yaongi_step 3.0" in lines and "yaongi_planned_steps 3.0" in lines
    assert "yaongi_tokens_total 768.0" in lines and "yaongi_steps_total 3.0" in lines
    values = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert all(values[f'yaongi_fp8_amax{{operand="{name}",rank="0"}}'] > 0 for name in ("input", "weight", "gradient"))
    for name in ("step", "startup", "data_wait", "validation", "checkpoint"):
        assert values[f'yaongi_goodput_seconds_total{{class="{name}"}}'] > 0
    assert sum(values[f'yaongi_source_tokens_total{{source="{name}"}}'] for name in ("ko", "en")) == 768


def test_skipped_step_changes_nothing_and_training_goes_on(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The third of four micro-batches of step 2 overflows; step 3 must see the weights of step 1."""
    from trainer.model import hybrid

    calls = []
    plain = hybrid.cross_entropy_sum

    def overflowing(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return plain(*tensors) * (float("inf") if len(calls) == 7 else 1)

    monkeypatch.setattr(hybrid, "cross_entropy_sum", overflowing)
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=3, checkpoint={"every_steps": 1, "keep_last": 3})
    assert train(spec) == 0
    assert [line["skipped"] for line in micro.metrics(spec)] == [None, "nonfinite", None]
    classes = token_classes(micro_data / "tokenizer" / "tokenizer.json")
    states = []
    for step in (1, 2, 3):
        model = build_model(spec.model, seed=0, token_classes=classes)
        load_model_weights(checkpoint.step_dir(spec.run_dir, step), model)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"])


def test_fp16_scales_the_loss_and_keeps_the_scale_over_a_resume(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An overflow in step 2 halves the scale and skips the step; the checkpoint carries the halved scale."""
    from trainer.model import hybrid

    scales, calls = [], []
    plain, update = hybrid.cross_entropy_sum, torch.amp.GradScaler.update

    def overflowing(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return plain(*tensors) * (float("inf") if len(calls) == 6 else 1)

    def watched(scaler: torch.amp.GradScaler, *arguments: float) -> None:
        update(scaler, *arguments)
        scales.append(scaler.get_scale())

    monkeypatch.setattr(hybrid, "cross_entropy_sum", overflowing)
    monkeypatch.setattr(torch.amp.GradScaler, "update", watched)
    spec = micro.micro_spec(
        micro_data,
        tmp_path / "run",
        steps=3,
        precision={"dtype": "fp16"},
        checkpoint={"every_steps": 3},
        schedule={"name": "constant"},
    )
    assert train(spec) == 0
    assert [line["skipped"] for line in micro.metrics(spec)] == [None, "nonfinite", None]
    assert scales == [2.0**16, 2.0**15, 2.0**15]
    manifest = checkpoint.read_manifest(checkpoint.step_dir(spec.run_dir, 3))
    assert manifest.scalars["scaler.scale"] == 2.0**15 and manifest.scalars["scaler._growth_tracker"] == 1
    scales.clear()
    assert train(spec.updated({"steps": 4})) == 0
    assert scales == [2.0**15], "not the initial one"
    reference = micro.micro_spec(micro_data, tmp_path / "fp32", steps=1)
    assert train(reference) == 0
    first, exact = micro.metrics(spec)[0], micro.metrics(reference)[0]
    assert first["loss"] == pytest.approx(exact["loss"], rel=1e-3), "the scale is divided out again"
    assert first["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.02)


def test_experts_below_a_tenth_of_the_mean_load_are_starved_in_the_worst_layer() -> None:
    load_LE = torch.tensor([[100, 100, 100, 100], [390, 5, 5, 0], [199, 100, 91, 10]])  # means of 100: limit 10
    run = SimpleNamespace(
        spec=SimpleNamespace(batch=SimpleNamespace(tokens_per_step=8)),
        recorder=SimpleNamespace(step_seconds=lambda: 2.0),
        optimizers=SimpleNamespace(learning_rate=0.1),
    )
    one = torch.ones((), dtype=torch.float64)
    totals = Totals(one.expand(2), torch.zeros(3, dtype=torch.float64), load_LE)
    batch = SimpleNamespace(tokens_by_source={}, answers_only=False, num_labels=2, num_rows=4)
    record = step_record(run, 0, batch, read(totals, Update(one, one > 2, -one), batch))
    assert (record.loss, record.auxiliary, record.skipped) == (0.5, {"router_balance": 0.25}, None)
    assert record.expert_load_max_ratio == 3.9
    assert record.expert_starved_ratio == 3 / 4

"""What Megatron-LM prints, read: lines of its own formats (core 0.12, and one of 0.5 from a public report)."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import micro
import pytest

from trainer.data.manifest import Manifest, read_manifest
from trainer.errors import DataError, SpecError
from trainer.megatron.blend import blend, trained
from trainer.megatron.log import Saved, Step, Validated, read
from trainer.megatron.recording import Recording, superfluous

STEP = (
    " [2026-03-02 11:07:45] iteration     1043/   14305 | consumed samples:       267008 | elapsed time per iteration "
    "(ms): 5444.9 | throughput per GPU (TFLOP/s/GPU): 239.8 | learning rate: 3.000000E-04 | global batch size:   256 | "
    "lm loss: 1.825991E+00 | load_balancing_loss: 1.019746E+00 | loss scale: 1.0 | grad norm: 1.426 | num zeros: 0.0 | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |"
)
SKIPPED = (
    " [2026-03-02 11:07:50] iteration     1044/   14305 | consumed samples:       267264 | elapsed time per iteration "
    "(ms): 5301.0 | learning rate: 3.000000E-04 | global batch size:   256 | loss scale: 1.0 | number of skipped "
    "iterations:   1 | number of nan iterations:   0 |"
)
WITHOUT_TIME = (
    " iteration      182/  250000 | consumed samples:       186368 | elapsed time per iteration (ms): 126995.3 | "
    "learning rate: 1.365E-05 | global batch size:  1024 | lm loss: 2.382640E+00 | loss scale: 1.0 | "
    "grad norm: 0.227 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def test_a_step_is_read():
    assert read(STEP) == Step(1043, 1.825991, 1.426, 3e-4, 5.4449, {"load_balancing_loss": 1.019746}, skipped=False)
    older = read(WITHOUT_TIME)
    assert isinstance(older, Step) and (older.step, older.loss, older.seconds) == (182, 2.38264, 126.9953)


def test_a_skipped_step_has_no_loss():
    found = read(SKIPPED)
    assert isinstance(found, Step) and found.skipped and math.isnan(found.loss) and math.isnan(found.grad_norm)


def test_validations_and_checkpoints_are_read():
    line = " validation loss at iteration 500 | lm loss value: 2.345678E+00 | lm loss PPL: 1.044031E+01 | "
    assert read(line) == Validated(500, 2.345678)
    at_the_end = (
        " validation loss at iteration 600 on validation set | lm loss value: 2.0E+00 | lm loss PPL: 7.4E+00 | "
    )
    assert read(at_the_end) == Validated(600, 2.0)
    saved = "  successfully saved checkpoint from iteration     500 to /mnt/runs/x/megatron [ t 1/4, p 1/2 ]"
    assert read(saved) == Saved(500)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "training ...",
        "-----------------------------------------------------------------------------------------",
        "[Rank 0] (after 1 iterations) memory (MB) | allocated: 37012.1 | max allocated: 41233.0 | reserved: 42000.0",
        "saving checkpoint at iteration     500 to /mnt/runs/x/megatron in torch_dist format",
        " > padded vocab (size: 151936) with 0 dummy tokens (new size: 151936)",
        "  iteration ....................................... 0",
        " iteration 3/10 | nothing that is known |",
    ],
)
def test_other_lines_say_nothing(line: str):
    assert read(line) is None


def test_the_blend_gives_each_source_its_weight(micro_data: Path, tmp_path: Path):
    mix = {"ko": {"weight": 0.3}, "en": {"weight": 0.7}}
    spec = micro.micro_spec(micro_data, tmp_path / "run", tokens={"mix": mix}, evaluate={"every_steps": 4})
    shards = read_manifest(micro_data / "shards")
    found = blend(spec, shards)
    train, valid = found["train"], found["valid"]
    assert train is not None and valid is not None and found["test"] is None
    assert train == ["0.3", f"{micro_data}/shards/ko-train", "0.7", f"{micro_data}/shards/en-train"]
    assert [Path(prefix).name for prefix in valid[1::2]] == ["ko-heldout", "en-heldout"]
    assert blend(spec.updated({"evaluate": {"every_steps": None}}), shards) == found | {"valid": None}
    assert trained(spec, 10) == {"ko": 768, "en": 1792}


def test_several_files_of_a_source_share_its_weight(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run")
    shards = read_manifest(micro_data / "shards")
    entry = shards.select("ko", "train")[0]
    second = entry.model_copy(update={"path": "ko-train-1.bin", "tokens": 3 * entry.tokens})
    grown = shards.model_copy(update={"files": [*shards.files, second]})
    train = blend(spec, grown)["train"] or []
    assert [float(weight) for weight in train[::2]] == pytest.approx([0.125, 0.375, 0.5])


def test_a_blend_that_would_repeat_too_often_or_has_no_tokens_is_refused(micro_data: Path, tmp_path: Path):
    shards = read_manifest(micro_data / "shards")
    long = micro.micro_spec(micro_data, tmp_path / "run", steps=100_000)
    with pytest.raises(DataError, match="max_epochs"):
        blend(long, shards)
    spec = micro.micro_spec(micro_data, tmp_path / "run")
    kept = [entry for entry in shards.files if entry.source == "ko"]
    with pytest.raises(DataError, match="source 'en' has no training tokens"):
        blend(spec, shards.model_copy(update={"files": kept}))


def test_answers_only_are_refused(answers_data: Path, tmp_path: Path):
    shards: Manifest = read_manifest(answers_data / "shards")
    with pytest.raises(SpecError, match="source ko trains on answers only"):
        blend(micro.micro_spec(answers_data, tmp_path / "run"), shards)


def test_old_checkpoints_go_but_not_the_last_one_before_the_decay(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=100)  # WSD: the rate falls from step 80 on
    for step in (20, 40, 60, 80, 90, 100, 200):
        (tmp_path / "run" / "megatron" / f"iter_{step:07d}").mkdir(parents=True)
    (tmp_path / "run" / "megatron" / "iter_draft").mkdir()
    assert {folder.name for folder in superfluous(spec, 100)} == {"iter_0000020", "iter_0000040", "iter_0000060"}


def test_skipped_steps_in_a_row_stop_every_rank(micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec, sent = micro.micro_spec(micro_data, tmp_path / "run", steps=100), []
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append((pid, number)))
    recorder, watchdog, world = Mock(), Mock(), Mock()
    recording = Recording(spec, world, recorder, watchdog, {"ko": 1000, "en": 1000})
    steps = [Step(n, 5.0, 1.0, 1e-3, 0.5, {}, skipped=n not in (3, 7)) for n in range(1, 19)]
    for step in steps[:16]:  # 9 in a row after the 7th
        recording.take(step)
    assert not recording.diverged and not sent
    recording.take(steps[16])
    recording.take(steps[17])
    assert recording.diverged == "10 steps in a row had no finite loss or gradient; the last is 17"
    assert sent == [(os.getpid(), signal.SIGTERM)]
    records = [call.args[0] for call in recorder.step.call_args_list]
    assert [record.skipped for record in records[:3]] == ["nonfinite", "nonfinite", None]
    assert records[0].clipped is False and records[0].tokens_per_second == 512


def test_the_balance_loss_is_the_sum_over_layers_that_our_own_engine_records(micro_data: Path, tmp_path: Path):
    """track_moe_metrics of core/transformer/moe/moe_utils.py divides by the layers with experts, without the weight."""
    moe = {"num_experts": 4, "top_k": 2, "expert_width": 16, "balance_loss_weight": 0.01, "sequence_loss_weight": 0.0}
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    model = {"layers": ["*E", "*-", "*E", "*E"], "moe": moe, "attention": attention, "mlp": {"width": 16}}
    spec = micro.micro_spec(micro_data, tmp_path / "run", model={**model, "mamba": None, "engram": []})
    recorder = Mock()
    recording = Recording(spec, Mock(), recorder, Mock(), {"ko": 1000, "en": 1000})
    recording.take(Step(1, 5.0, 1.0, 1e-3, 0.5, {"load_balancing_loss": 1.1}, skipped=False))
    assert recorder.step.call_args.args[0].auxiliary == {"router_balance": pytest.approx(3 * 0.01 * 1.1)}

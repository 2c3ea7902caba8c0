"""The spike guard: its arithmetic against numpy, and in the loop with an abnormal batch."""

from __future__ import annotations

from pathlib import Path

import micro
import numpy as np
import pytest
import torch

from trainer.data.loader import StepBatch, TokenLoader
from trainer.loop import train
from trainer.optim import Optimizers
from trainer.outcome import why_skipped
from trainer.spec import MAX_SKIPPED_STEPS, SpikeGuardSpec
from trainer.spikes import SKIP_REASONS, SpikeGuard


def judged(values: list[float], guard: SpikeGuard) -> list[str | None]:
    return [judge(guard, value, 1.0) for value in values]


def judge(guard: SpikeGuard, loss: float, grad_norm: float) -> str | None:
    """As the loop does."""
    values = (torch.tensor(value, dtype=torch.float64) for value in (loss, grad_norm))
    reason = int(why_skipped(*values, guard.limits()))
    guard.enter(loss, grad_norm)
    return None if reason < 0 else SKIP_REASONS[reason]


def test_limit_is_mean_plus_k_sigma_of_the_window_before():
    random = np.random.default_rng(0)
    losses = random.normal(3.0, 0.1, 400) + 2 * (random.random(400) < 0.03)
    guard = SpikeGuard(SpikeGuardSpec(sigmas=4, window=32))
    found = judged(losses.tolist(), guard)
    expected = []
    for step, loss in enumerate(losses):
        before = losses[max(0, step - 32) : step]
        expected.append("loss_spike" if len(before) >= 16 and loss > before.mean() + 4 * before.std() else None)
    assert found == expected
    assert 3 < len([reason for reason in found if reason]) < 15


@pytest.mark.parametrize("window", [12, 50, 128, 300])
def test_a_constant_loss_is_no_spike(window):
    """For some of these values the sum, divided by their number, is less than each of them."""
    for loss in np.random.default_rng(2).uniform(0.1, 9.0, 20).tolist():
        guard = SpikeGuard(SpikeGuardSpec(window=window))
        assert judged([loss] * (window // 2 + 5), guard) == [None] * (window // 2 + 5)
        assert judge(guard, loss * 1.001, 1.0) == "loss_spike"


def test_gradient_norm_spikes_alone_and_small_values_never():
    guard = SpikeGuard(SpikeGuardSpec(window=8))
    for step in range(8):
        assert judge(guard, 2.0 + 0.1 * (step % 2), 0.5 + 0.01 * (step % 2)) is None
    assert judge(guard, 0.0, 0.0) is None
    assert judge(guard, 2.0, 9.0) == "gradient_spike"
    assert judge(guard, 20.0, 90.0) == "loss_spike"


def test_lasting_rise_is_skipped_at_most_four_times():
    random = np.random.default_rng(1)
    guard = SpikeGuard(SpikeGuardSpec())
    assert judged(random.normal(2.0, 0.02, 128).tolist(), guard) == [None] * 128
    after = judged(random.normal(8.0, 0.02, 128).tolist(), guard)
    assert after[:3] == ["loss_spike"] * 3 and after[4:] == [None] * 124


@pytest.mark.parametrize("sigmas", [0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 20.0])
def test_a_lasting_rise_never_ends_a_run(sigmas):
    """The rise without noise is the worst one; every window that the spec takes lets it in before the tenth step."""
    taken = []
    for window in (8, 32, 50, 64, 90, 91, 128, 200, 400, 1024):
        try:
            guard = SpikeGuard(SpikeGuardSpec(sigmas=sigmas, window=window))
        except ValueError as error:
            assert "raise sigmas or lower window" in str(error)
            continue
        taken.append(window)
        judged([2.0] * window, guard)
        after = judged([8.0] * window, guard)
        skipped = after.index(None)
        assert 1 <= skipped < MAX_SKIPPED_STEPS and after[skipped:] == [None] * (window - skipped), window
    assert taken == {0.5: [8], 1.0: [8], 2.0: [8, 32], 3.0: [8, 32, 50, 64, 90]}.get(sigmas, taken)


@pytest.mark.parametrize("spec", [None, SpikeGuardSpec(window=8)])
def test_what_is_not_finite_is_refused_and_forgotten(spec):
    guard = SpikeGuard(spec)
    for bad in (float("nan"), float("inf")):
        assert judge(guard, bad, 1.0) == judge(guard, 1.0, bad) == "nonfinite"
    assert guard.state() == {}


def test_without_a_guard_everything_finite_passes():
    assert judged([1.0] * 300 + [1e9], SpikeGuard(None)) == [None] * 301


def test_state_is_exact_and_a_shorter_window_takes_the_newest():
    values = np.random.default_rng(2).random(40).tolist()
    whole, stopped = SpikeGuard(SpikeGuardSpec(window=16)), SpikeGuard(SpikeGuardSpec(window=16))
    judged(values, whole)
    judged(values[:20], stopped)
    resumed = SpikeGuard(SpikeGuardSpec(window=16))
    resumed.load(stopped.state() | {"seconds": 3.0})
    judged(values[20:], resumed)
    assert resumed.state() == whole.state() and len(whole.state()) == 32
    shorter = SpikeGuard(SpikeGuardSpec(window=8))
    shorter.load(whole.state())
    assert [shorter.state()[f"spike_guard.loss.{i}"] for i in range(8)] == values[-8:]


@pytest.mark.usefixtures("quiet_checkpoint_library", "leave_no_traces")
def test_spike_batch_changes_nothing_is_counted_and_survives_a_resume(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Step 10 gets a token for its label that never occurs, which a model that has learnt the others rules out."""
    plain_next, plain_step = TokenLoader.__next__, Optimizers.step
    skips: list[bool] = []

    def next_with_spike(loader: TokenLoader) -> StepBatch:
        batch = plain_next(loader)
        if sum(batch.tokens_by_source.values()) == 10 * 256:
            for part in batch.micro_batches:
                part.labels_BT[part.labels_BT >= 0] = micro.VOCAB - 1
        return batch

    def watched_step(optimizers: Optimizers, skip: torch.Tensor) -> None:
        """What torch's own comparison of all weights and state, before and after, says of a step."""
        before = [tensor.clone() for tensor in (*optimizers.parameters, *optimizers.state_dict().values())]
        plain_step(optimizers, skip)
        after = (*optimizers.parameters, *optimizers.state_dict().values())
        skips.append(all(torch.equal(one, other) for one, other in zip(before, after, strict=True)))

    monkeypatch.setattr(TokenLoader, "__next__", next_with_spike)
    monkeypatch.setattr(Optimizers, "step", watched_step)
    rate = {"learning_rate": 0.02}
    options = {
        "optimizer": {"spike_guard": {"window": 8, "sigmas": 4}, "muon": rate, "adamw": rate},
        "schedule": {"name": "constant", "warmup_fraction": 0},
        "checkpoint": {"every_steps": 12},
    }

    def run(name: str, *ends: int) -> list[dict]:
        for steps in ends:
            spec = micro.micro_spec(micro_data, tmp_path / name, steps=steps, **options)
            assert train(spec) == 0
        return [{k: line[k] for k in ("step", "loss", "grad_norm", "skipped")} for line in micro.metrics(spec)]

    whole = run("whole", 12)
    assert [line["skipped"] for line in whole] == [None] * 9 + ["loss_spike"] + [None] * 2
    assert skips == [False] * 9 + [True] + [False] * 2, "the spike's gradients are never applied"
    assert run("parts", 8, 12) == whole, "the window is part of the checkpoint"

"""Schedules against transformers' at every step, and their own guarantees."""

import math

import pytest
import torch
from transformers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from manifests.spec import load_job
from trainer.optim.schedule import learning_rate_factor
from trainer.spec import ScheduleSpec

STEPS = 100


def _ours(peak=1.0, **fields):
    spec = ScheduleSpec(**fields)
    return [learning_rate_factor(step, STEPS, spec, peak) for step in range(STEPS)]


def _theirs(make, **options):
    """Their factor before step s+1: they count from a rate of 0 before the first step, we from the first that moves."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, **options)
    factors = []
    for _ in range(STEPS):
        optimizer.step()
        schedule.step()
        factors.append(schedule.get_last_lr()[0])
    return factors


@pytest.mark.parametrize(("shape", "their_shape"), [("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt")])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_equals_transformers(shape, their_shape, floor):
    warmup, decay = 10, 30
    theirs = _theirs(
        get_wsd_schedule,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=STEPS,
        decay_type=their_shape,
        min_lr_ratio=floor,
    )
    ours = _ours(warmup_fraction=0.1, decay_fraction=0.3, decay_shape=shape, final_learning_rate=floor)
    # with a floor, theirs warms up from the floor and ours from 0
    start = 0 if floor == 0 else warmup
    assert ours[start:] == pytest.approx(theirs[start:], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "make"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_cosine_and_linear_equal_transformers(name, make):
    theirs = _theirs(make, num_warmup_steps=10, num_training_steps=STEPS)
    assert _ours(name=name, warmup_fraction=0.1, final_learning_rate=0) == pytest.approx(theirs, abs=1e-12)


def test_wsd_closed_form():
    """W = 4, stable, then 20 steps down to 1e-5 / 2e-3."""
    peak, final = 2e-3, 1e-5
    ours = _ours(peak, warmup_fraction=0.04, decay_fraction=0.2, final_learning_rate=final)
    rates = [peak * factor for factor in ours]
    expected = [peak * (s + 1) / 4 for s in range(4)] + [peak] * 76
    expected += [peak - (peak - final) * k / 20 for k in range(1, 21)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[-1] == pytest.approx(final)


def test_constant_and_no_warmup():
    assert _ours(name="constant", warmup_fraction=0) == [1.0] * STEPS
    assert _ours(warmup_fraction=0, decay_fraction=0) == [1.0] * STEPS


def test_a_short_run_decays_in_its_last_step():
    spec = ScheduleSpec(warmup_fraction=0, decay_fraction=0.01, final_learning_rate=0.1)
    assert [learning_rate_factor(step, 7, spec, 1.0) for step in range(8)] == pytest.approx([1.0] * 6 + [0.1] * 2)


def test_without_a_decay_later_steps_keep_the_peak():
    spec = ScheduleSpec(warmup_fraction=0, decay_fraction=0, final_learning_rate=0.1)
    assert [learning_rate_factor(step, STEPS, spec, 1.0) for step in (STEPS - 1, STEPS, 2 * STEPS)] == [1.0] * 3


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
def test_stays_at_the_end_value(name):
    spec = ScheduleSpec(name=name, final_learning_rate=0.1)
    for step in (STEPS - 1, STEPS, 10 * STEPS):
        assert learning_rate_factor(step, STEPS, spec, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_are_positive_and_finite(steps):
    for name in ("wsd", "cosine", "linear", "constant"):
        for step in range(steps):
            factor = learning_rate_factor(step, steps, ScheduleSpec(name=name, final_learning_rate=1e-3), 1.0)
            assert 0 < factor <= 1 and math.isfinite(factor)


@pytest.mark.parametrize(
    ("shape", "remaining"),
    [
        ("linear", lambda r: 1 - r),
        ("cosine", lambda r: math.cos(math.pi * r / 2) ** 2),
        ("sqrt", lambda r: 1 - r**0.5),
    ],
)
def test_the_schedule_of_h100_4b_at_every_step(shape, remaining):
    """15B tokens in steps of 524,288: 1% warm-up to 2e-3, stable, last 20% down to 1e-5, counted in whole steps."""
    train = load_job("h100-4b").train
    steps, warmup, decay, peak, final = 28_610, 286, 5_722, 2e-3, 1e-5
    assert (train.steps, train.optimizer.muon.learning_rate) == (steps, peak)
    spec = train.schedule.updated({"decay_shape": shape})
    for step in range(steps):
        if step < warmup:
            expected = peak * (step + 1) / warmup
        elif step < steps - decay:
            expected = peak
        else:
            expected = final + (peak - final) * remaining((step + 1 - (steps - decay)) / decay)
        assert peak * learning_rate_factor(step, steps, spec, peak) == pytest.approx(expected, rel=1e-9), step


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear", "constant"])
def test_cosine_warm_up_of_every_schedule(name):
    """sin² of a quarter turn; afterwards nothing differs from the linear one."""
    ours = _ours(name=name, warmup_fraction=0.2, warmup_shape="cosine", final_learning_rate=0.01)
    assert ours[:20] == pytest.approx([math.sin(math.pi * (step + 1) / 40) ** 2 for step in range(20)], abs=1e-12)
    assert ours[20:] == _ours(name=name, warmup_fraction=0.2, final_learning_rate=0.01)[20:]

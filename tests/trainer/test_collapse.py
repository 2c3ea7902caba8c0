"""The warning of model collapse, from validations as a run writes them, and from a real run that forgets real text."""

import json
import logging
from pathlib import Path

import micro
import pytest
import yaml

from pipelines.runs import standing
from trainer.loop import train
from trainer.recording.advice import MARK, advice
from trainer.recording.collapse import collapse, distinct, synthetic_sources
from trainer.report import write_report

MADE = frozenset({"made"})


def line(step: int, real: float | None, made: float, text: str = "a b c d e f") -> dict:
    scores = {"web": (real, 100), "books": (real, 300), "made": (made, 200)}
    sources = {name: {"bits_per_byte": score, "bytes": size} for name, (score, size) in scores.items()}
    return {"step": step, "sources": sources, "samples": [{"prompt": "", "text": text}], "domains": {}}


FALLING = [line(n, real, 2.0 - n / 10) for n, real in enumerate((1.5, 1.2, 1.21, 1.215, 1.22), start=1)]


def test_real_text_gets_worse_while_synthetic_gets_better():
    repeating = [*FALLING[:-1], line(5, 1.22, 1.5, "a b c a b c a b c a b c")]
    assert collapse(repeating, MADE) == (
        "real held-out text has got worse since step 2 (1.200 → 1.220 bits per byte) while synthetic text still gets "
        "better (1.800 → 1.500); distinct 3-grams of its samples 100% → 30%: lower the weight of made, or go back to "
        "that step"
    )


@pytest.mark.parametrize(
    "validations",
    [
        FALLING[:4],  # two validations after the best
        [line(n, 1.2 + 0.002 * n, 1.0 / n) for n in range(1, 6)],  # less than a hundredth worse
        [line(n, 1.0 + 0.1 * n, 1.0 + 0.1 * n) for n in range(1, 6)],  # both get worse: something else
        [line(n, 2.0 / n, 2.0 / n) for n in range(1, 6)],
        [line(n, None, 1.0 / n) for n in range(1, 6)],  # not finite
        [{"step": 1, "domains": {}}] * 5,  # of an earlier version
        [],
    ],
)
def test_all_is_well_or_unknown(validations: list[dict]):
    assert collapse(validations, MADE) is None


def test_without_both_kinds_there_is_nothing_to_compare():
    assert collapse(FALLING, frozenset()) is None
    assert collapse(FALLING, frozenset({"made", "web", "books"})) is None


def test_distinct_ngrams():
    assert distinct([{"text": "a b c d"}, {"text": "a b c d"}]) == 0.5 and distinct([{"text": "a b"}]) is None


def test_sources_of_the_job(tmp_path: Path):
    assert synthetic_sources(tmp_path) == frozenset()
    job = {"data": {"sources": {"made": {"synthetic": 1.0}, "web": {}, "mixed": {"synthetic": 0.4}}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert synthetic_sources(tmp_path) == MADE
    (tmp_path / "job.yaml").write_text("data: [1]")
    assert synthetic_sources(tmp_path) == frozenset()


def test_a_run_that_forgets_real_text_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, leave_no_traces, quiet_checkpoint_library
):
    """Real text in the first steps, then only a monotonous source of a model, at a rate that makes it forget."""
    caplog.set_level(logging.INFO, "trainer")
    directory = tmp_path / "data"
    micro.make_data(directory, own={"en": ["x x x x x x x x x x x x"] * 150})
    spec = forgetful(directory, tmp_path / "run")
    (tmp_path / "run").mkdir()
    job = {"data": {"sources": {"ko": {"synthetic": 0.0}, "en": {"synthetic": 1.0}}}}
    (tmp_path / "run" / "job.yaml").write_text(yaml.safe_dump(job))
    assert train(spec) == 0
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith(MARK)]
    assert said and "real held-out text has got worse since step" in said[-1] and "lower the weight of en" in said[-1]
    assert said[-1].removeprefix(MARK) in standing.of_directory(Path(spec.run_dir)).advice
    assert "real held-out text has got worse" in write_report(spec.run_dir).read_text()
    validations = [json.loads(one) for one in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert advice((), spec, validations[:2]) == []


def forgetful(directory: Path, run_dir: Path):
    return micro.micro_spec(
        directory,
        run_dir,
        steps=24,
        schedule={"name": "constant"},
        optimizer={"muon": {"learning_rate": 0.05}, "adamw": {"learning_rate": 0.05}, "spike_guard": None},
        evaluate={"every_steps": 2, "every_max_tokens": 400, "prompts": []},
        tokens={
            "mix": {"ko": {"weight": 0.5, "max_epochs": 1000}, "en": {"weight": 0.5, "max_epochs": 1000}},
            "curriculum": [{"from_tokens": 2048, "weights": {"en": 1.0}}],
        },
    )

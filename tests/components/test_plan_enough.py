"""Data steps name sources that are too small for a run, with the trainer's own numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from raw_cases import small_job, write_raw

from components.plan import enough
from components.shards import step
from components.tokenizer import step as tokenizer_step
from manifests.spec import JobSpec
from trainer.data.loader import TokenLoader
from trainer.data.manifest import DataError, StageResult
from trainer.errors import foreseen
from trainer.exitcodes import ExitCode


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageResult, StageResult]:
    """Raw text and shards of it."""
    directory = tmp_path_factory.mktemp("data")
    job = small_job(directory)
    raw = write_raw(job)
    return directory, raw, step.run(job, raw, tokenizer_step.run(job, raw))


def job_of(directory: Path, steps: int, **train: object) -> JobSpec:
    return small_job(directory, {"train": {"steps": steps, **train}})


def test_shards_are_refused_as_the_trainer_would_refuse_them(prepared: tuple[Path, StageResult, StageResult]) -> None:
    directory, _, shards = prepared

    def refused(steps: int, **train: object) -> tuple[str, str]:
        job = job_of(directory, steps, **train)
        said = []
        spec = job.train_spec()
        for check in (
            lambda: enough.tokens_suffice(job, shards),
            lambda: TokenLoader(spec.tokens, spec.batch, rank=0, world_size=1, steps=steps).close(),
        ):
            try:
                check()
                said.append("")
            except DataError as error:
                said.append(str(error))
        return said[0], said[1]

    least, most = 1, 100_000  # the first number of steps that is refused, found by bisection
    while least < most:
        middle = (least + most) // 2
        ours, trainers = refused(middle)
        assert ours == trainers
        least, most = (least, middle) if ours else (middle + 1, most)
    assert 1 < least < 100_000
    tokens = job_of(directory, 1).train.batch.tokens_per_step
    ours, trainers = refused(least - 1, skip=[[0, tokens]])
    assert ours == trainers and "would need" in ours, "what is skipped is drawn too"


def test_text_is_refused_only_where_no_tokenizer_could_make_enough_of_it(
    prepared: tuple[Path, StageResult, StageResult],
) -> None:
    directory, raw, shards = prepared
    steps = next(n for n in range(1, 1000) if _refuses(lambda n=n: enough.tokens_suffice(job_of(directory, n), shards)))
    enough.text_suffices(job_of(directory, steps), raw)
    with pytest.raises(DataError, match=r"a token for each byte\) × max_epochs") as caught:
        enough.text_suffices(job_of(directory, 100_000), raw)
    known = foreseen(caught.value)
    assert known is not None and known.code == ExitCode.DATA


def test_data_prepared_alone_is_not_refused(
    prepared: tuple[Path, StageResult, StageResult],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(enough.DATA_ALONE_VARIABLE, "shards")
    enough.tokens_suffice(job_of(prepared[0], 100_000), prepared[2])
    assert "too little for train.steps 100,000: source" in capsys.readouterr().out


def _refuses(check) -> bool:
    try:
        check()
    except DataError:
        return True
    return False

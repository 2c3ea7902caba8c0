"""docs/data.md agrees with the presets and the spec on the default mix and job files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import manifests
from manifests.spec import job_from, load_job

PAGE = (Path(manifests.__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", ["h100-4b", "h100-4b-interleaved"])
def test_the_table_is_the_preset(preset: str) -> None:
    job = load_job(preset)
    tokens = job.train.steps * job.train.batch.tokens_per_step
    rows = [re.split(r" *\| *", line)[1:-1] for line in re.findall(r"^\| (?:ko|en|code|math)-.*\|$", PAGE, re.M)]
    assert [row[0] for row in rows] == list(job.data.sources)
    for name, share, billions, there, epochs, licence, synthetic, where in rows:
        source = job.data.sources[name]
        wanted, available = source.weight * tokens, source.available_tokens
        assert available is not None
        assert share == f"{source.weight:.0%}" and billions == f"{wanted / 1e9:.2f}B"
        assert re.sub(r"[≥ ]|\(.\)|B", "", there) == f"{available / 1e9:g}"
        assert wanted / available < 0.1 if epochs == "< 0.1" else abs(wanted / available - float(epochs)) <= 0.051
        assert (synthetic == "yes") == (source.synthetic == 1) and source.synthetic in (0, 1)
        assert where.startswith(source.origin.dataset) and (source.origin.config or "") in where
        assert licence.startswith("ODC-By") == source.licence.startswith("ODC-By")


def test_the_job_files_of_the_page_are_accepted() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
    jobs = [job_from({"preset": "h100-4b"} | block) for block in blocks]
    assert len(jobs) == 6
    assert jobs[0].data.sources["papers"].columns == ["title", "abstract"] and "ko-web" not in jobs[0].data.sources
    assert jobs[1].data.sources["chat"].loss == "answers"
    assert jobs[2].hygiene.evaluation.keys() == {"gsm8k", "mine"}
    assert [stage.from_tokens for stage in jobs[3].train.curriculum] == [8e9, 12e9]
    assert jobs[4].data.scored == ["ko"] and jobs[5].data.score_columns == {"en-fineweb-edu": "score"}

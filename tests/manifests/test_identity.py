"""Digests and names of jobs are the same in every version, so that what lies on the volumes is found again."""

from __future__ import annotations

import json

import pytest
from former import FIXTURES

from manifests.spec import job_from, preset_names

JOBS = json.loads((FIXTURES / "v0.1" / "identities.json").read_text())


@pytest.mark.parametrize("name", JOBS)
def test_keys_and_names_are_those_of_version_0_1(name: str):
    expected = JOBS[name]
    job = job_from(expected["job"])
    found = {"raw": job.raw_key, "hygiene": job.hygiene_key, "tokenizer": job.tokenizer_key, "shards": job.shards_key}
    assert found | {"run": job.run_name} == {key: value for key, value in expected.items() if key != "job"}


def test_every_preset_is_among_them():
    assert set(preset_names()) <= set(JOBS)

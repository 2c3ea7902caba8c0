"""Presets and README state the licences of the sample corpus that its documents state."""

import gzip
import json
import re
from pathlib import Path

import pytest

import components.download
from manifests.spec import load_job

SAMPLE = Path(components.download.__file__).parent / "sample"


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("name", ["ko", "en", "code", "math"])
def test_a_presets_licence_names_those_of_all_its_documents(preset, name):
    with gzip.open(SAMPLE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = {json.loads(line)["licence"] for line in lines}
    assert set(load_job(preset).data.sources[name].licence.split(" AND ")) == found


def test_the_conversations_are_ours_and_in_two_languages_and_each_is_answered():
    with gzip.open(SAMPLE / "chat.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert {row["licence"] for row in rows} == {"Apache-2.0"} and all(
        row["source"].startswith("generated/") for row in rows
    )
    texts = [" ".join(message["content"] for message in row["messages"]) for row in rows]
    assert len(set(texts)) == len(rows) == 640
    assert 0.4 < sum(bool(re.search("[가-힣]", row["messages"][-2]["content"])) for row in rows) / len(rows) < 0.6
    assert {row["messages"][-1]["role"] for row in rows} == {"assistant"}
    assert sum("<think>" in text for text in texts) > 50


def test_the_licence_texts_that_must_come_along_do():
    named = re.findall(r"\]\((licences/[^)]+)\)", (SAMPLE / "README.md").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(f"licences/{path.name}" for path in (SAMPLE / "licences").iterdir())
    psf = (SAMPLE / "licences" / "PSF-2.0.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in psf and "2023 Python Software Foundation" in psf
    assert "The Apache Software Foundation" in (SAMPLE / "licences" / "apache-httpd-NOTICE.txt").read_text()

"""What the presets and the README say about the licences of the sample corpus is what its documents say."""

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


def test_the_licence_texts_that_must_come_along_do():
    named = re.findall(r"\]\((licences/[^)]+)\)", (SAMPLE / "README.md").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(f"licences/{path.name}" for path in (SAMPLE / "licences").iterdir())
    psf = (SAMPLE / "licences" / "PSF-2.0.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in psf and "2023 Python Software Foundation" in psf
    assert "The Apache Software Foundation" in (SAMPLE / "licences" / "apache-httpd-NOTICE.txt").read_text()

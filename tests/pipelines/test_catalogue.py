"""The components as files for other teams: in sync with the code, and usable behind somebody else's steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_job import small_job

import components
from pipelines.compile import CATALOGUE, CATALOGUED
from trainer.checkpoints.checkpoint import latest_step

ROOT = Path(components.__file__).parents[1]
PAGE = ROOT / "docs" / "components.md"
RUN = """
if __name__ == "__main__":
    import sys
    from pathlib import Path
    from kfp import local
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1] + "/root")
    ours(job=Path(sys.argv[1], "job.json").read_text(), steps=2, folder=sys.argv[1] + "/texts")
"""


def test_the_committed_files_are_the_compiled_components(tmp_path):
    # In a separate process, without this machine's image names.
    command = [sys.executable, "-m", "pipelines.compile", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={"PATH": "/usr/bin:/bin"})
    made = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_text() for file in CATALOGUE.iterdir()}, "stale; run `make gen`"


def test_every_component_of_ours_is_in_the_catalogue_and_on_its_page():
    defined = {name for file in (ROOT / "components").glob("*/component.py") for name in _components(file)}
    assert defined == CATALOGUED.keys()
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert {name.strip() for row in rows[1:] for name in row.split(",")} == defined


def _components(file: Path) -> list[str]:
    return re.findall(r"^@dsl\.component.*\ndef (\w+)", file.read_text(), re.M)


@pytest.mark.parametrize("name", CATALOGUED)
def test_a_component_has_an_image_and_explains_its_inputs(name):
    component = yaml.safe_load((CATALOGUE / f"{name}.yaml").read_text())
    (executor,) = component["deploymentSpec"]["executors"].values()
    assert re.fullmatch(r"localhost/yaongi-pipeline:[\d.]+", executor["container"]["image"])
    assert "pip install" not in " ".join(executor["container"]["command"])
    given = component["root"]["inputDefinitions"]["parameters"]
    for field, found in given.items():
        assert found["description"].strip(), field


def test_the_example_of_the_page_trains_on_another_teams_texts(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "example.py").write_text(example + RUN)
    job = yaml.safe_load(small_job(tmp_path).read_text())
    del job["data"], job["train"]["steps"]
    job |= {"cluster": {"target": "local"}}
    job["storage"] = {name: str(tmp_path / name.partition("_")[0]) for name in ("datasets_dir", "checkpoints_dir")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(tmp_path / "example.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "checkpoints" / "runs").iterdir()
    assert latest_step(run) == 2
    assert "ours" in (run / "job.yaml").read_text()

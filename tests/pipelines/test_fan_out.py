"""Encoding two ranges in a ParallelFor under kfp.local gives the same files as one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = """
import sys
from kfp import dsl, local
from components.data.component import data
from components.plan.component import plan
from components.shards.component import encode, shards

@dsl.pipeline(name="prepare")
def prepare(overrides: str):
    planned = plan(preset="tiny", steps=1, nodes=1, gpus_per_node=0, datasets_pvc="", checkpoints_pvc="",
                   trainer_image="", hub_secret="", overrides=overrides).outputs
    ready = data(job=planned["job"]).outputs
    with dsl.ParallelFor(planned["Output"]):
        with dsl.ParallelFor(ready["Output"]) as part:
            encoded = encode(part=part).output
        shards(encoded=dsl.Collected(encoded))

if __name__ == "__main__":
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1])
    prepare(overrides=sys.argv[2])
"""


@pytest.mark.slow
def test_two_pods_give_the_files_of_one(tmp_path: Path) -> None:
    script = tmp_path / "data.py"
    script.write_text(PIPELINE)
    found = {}
    for pods in (1, 2):
        folder = tmp_path / str(pods)
        overrides = {
            "cluster": {"target": "local"},
            "storage": {"datasets_dir": str(folder / "datasets"), "checkpoints_dir": str(folder)},
            "shards": {"pods": pods, "workers": 1},
            "tokenizer": {"vocab_size": 1024, "sample_bytes": 300_000},
            "train": {"model": {"vocab_size": 1024}},
        }
        command = [sys.executable, str(script), str(folder / "root"), json.dumps(overrides)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("encode 2/2" in done.stdout) == ("units were done before" in done.stdout) == (pods == 2)
        assert "encoding with tiktoken" in done.stdout
        shards = next((folder / "datasets" / "shards").iterdir())
        found[pods] = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert found[1] == found[2] and len(found[1]) > 8

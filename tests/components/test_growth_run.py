"""`yaongi` itself extends a run of a Hub source: more is downloaded, and the run continues from before its decay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer
from raw_cases import texts

YAONGI = Path(sys.executable).with_name("yaongi")
ROWS = texts("en", 900)
FILES = {
    f"{number}.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in ROWS[number::3]).encode()
    for number in range(3)
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def job() -> dict[str, Any]:
    origin = {"kind": "hub", "dataset": "org/texts", "files": ["*.jsonl"]}
    source = {"domain": "en", "licence": "CC0-1.0", "weight": 1.0, "max_epochs": 1, "text_column": "text"}
    return {
        "preset": "tiny",
        "data": {
            "sources": dict.fromkeys(["ko", "en", "code", "math"]) | {"web": source | {"origin": origin}},
            "heldout_fraction": 0.1,
        },
        "tokenizer": {"vocab_size": 640, "sample_bytes": 8000},
        "shards": {"unit_bytes": 4096, "max_shard_bytes": 65536},
        "train": {
            "steps": 10,
            "seq_len": 32,
            "model": {"vocab_size": 640, "layers": ["M", "*-"], "engram": []},
            "batch": {"tokens_per_step": 256, "micro_batch_rows": 4},
            "checkpoint": {"every_steps": 4},
            "runtime": {"log_every_steps": 1, "metrics_port": 0},
            "evaluate": {"max_tokens": 300, "sample_tokens": 4, "prompts": ["The"]},
        },
        "cluster": {"nodes": 1},
    }


def test_a_run_that_is_made_longer_trains_on_what_is_appended(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job()))
    with HubServer(FILES) as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}

        def yaongi(*arguments: str, code: int = 0) -> str:
            command = [YAONGI, *arguments, "--workdir", "work"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
            assert done.returncode == code, done.stdout + done.stderr
            return done.stderr

        yaongi("run", "job.yaml")
        (run,) = (tmp_path / "work/checkpoints/runs").iterdir()
        (tokenizer,) = (tmp_path / "work/datasets/tokenizers").iterdir()
        trained = (tokenizer / "manifest.json").stat().st_mtime_ns
        yaongi("run", "job.yaml", "--set", "train.steps=20")
        (raw,) = (tmp_path / "work/datasets/raw").iterdir()
        (shards,) = (tmp_path / "work/datasets/shards").iterdir()
        grown = [len(json.loads((stage / "manifest.json").read_bytes())["earlier"]) for stage in (raw, shards)]
        assert grown == [1, 1] and (tokenizer / "manifest.json").stat().st_mtime_ns == trained
        assert "stands at step 20" in yaongi("run", "job.yaml", code=2), "nothing is given up"
    assert [path.name for path in (tmp_path / "work/checkpoints/runs").iterdir()] == [run.name]
    steps = [json.loads(line)["step"] for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 9), *range(9, 21)], "it went on from before the decay, which began after step 8"

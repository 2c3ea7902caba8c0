"""The whole pipeline on a real cluster: raw text to an export, under kfp.local in one pod, training in a PyTorchJob.

The oracle of the training is the same job on this machine: same spec, same versions, so the same losses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kube import TRAINER_IMAGE, pod
from pipeline_run import RUN_TIMEOUT, SETS, STEPS, PipelineRun, losses
from scrape import Prometheus

from components.marks import FAILED
from manifests.kinds import PYTORCHJOB
from manifests.names import job_name
from manifests.spec import load_job
from trainer.exitcodes import ExitCode
from trainer.specbase import changes_from_sets

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same job on this machine: two processes, the versions of this environment."""
    workdir = tmp_path_factory.mktemp("local")
    sets = ["name=first", *SETS, "train.runtime.metrics_port=0"]  # another run may have the port here
    command = [str(Path(sys.executable).with_name("yaongi")), "run", "tiny", "--workdir", str(workdir)]
    command += [part for change in sets for part in ("--set", change)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in the pods: sums depend on the number of threads
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    job = load_job("tiny", changes_from_sets(sets))
    return workdir / "checkpoints" / "runs" / job.run_name


def test_the_pipeline_succeeds_from_raw_text_to_an_export(first: PipelineRun) -> None:
    assert first.code == 0, first.log
    assert first.condition == "Succeeded"
    for step in ("plan", "download", "hygiene", "tokenizer", "shards", "train", "evaluate", "export", "tune"):
        assert step in first.log
    result = first.read_json("result.json")
    assert result["steps"] == STEPS and result["world_size"] == 2
    assert result["loss_last"] < result["loss_first"] - 1, "the model learned nothing"
    assert first.read_json("eval.json")
    assert "safetensors" in first.namespace.execute("reader", "ls", f"{first.job.run_dir}/export")


def test_workers_have_what_the_job_gives_them_and_say_over_what_they_talk(first: PipelineRun) -> None:
    assert first.code == 0, first.log
    workers = first.namespace.find("pods", "-l", f"{PYTORCHJOB.selector(job_name(first.job))},team=e2e")
    assert workers, "the operator removes only those that still ran when the first had ended"
    for worker in workers:
        assert worker["metadata"]["annotations"]["example.com/note"] == "a, b"
        assert {"name": "TEAM_NOTE", "value": "two words"} in worker["spec"]["containers"][0]["env"]
        (spread,) = worker["spec"]["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"].items() <= worker["metadata"]["labels"].items()
    assert re.search(r"gloo over eth0 \([0-9.]+\)", first.read("logs/rank-0.log"))


def test_the_model_is_tuned_by_a_job_of_its_own(first: PipelineRun) -> None:
    assert first.code == 0, first.log
    tuned = PipelineRun(first.namespace, first.pod, first.job.tuning())
    assert tuned.condition == "Succeeded"
    result, evaluation = tuned.read_json("result.json"), tuned.read_json("eval.json")
    assert (result["steps"], result["world_size"]) == (6, 2) and len(tuned.losses) == 6
    before, after = evaluation["begun_with"]["domains"]["en"]["loss"], evaluation["domains"]["en"]["loss"]
    print(f"held-out loss of answers {before:.3f} -> {after:.3f}")
    assert after < before and evaluation["samples"][0]["prompt"] == "What is 3 + 4?"
    assert "safetensors" in first.namespace.execute("reader", "ls", f"{tuned.job.run_dir}/export")


def test_what_it_leaves_belongs_to_user_and_group_1000_and_the_group_may_write_it(first: PipelineRun) -> None:
    assert first.code == 0, first.log
    made = [f"{first.job.run_dir}/{name}" for name in ("job.yaml", "result.json", "logs/metrics.jsonl")]
    made.append(f"{first.job.stage_dir('shards')}/manifest.json")
    assert set(first.namespace.execute("reader", "stat", "-c", "%u:%g %a", *made).split("\n")) == {"1000:1000 664", ""}


def test_losses_equal_those_of_the_same_job_on_this_machine(first: PipelineRun, here: Path) -> None:
    import torch

    assert first.code == 0, first.log
    there = first.namespace.execute("reader", "cat", f"{first.job.stage_dir('shards')}/manifest.json")
    here_shards = Path(here).parents[2] / "datasets" / "shards" / first.job.shards_key / "manifest.json"
    assert json.loads(there)["files"] == json.loads(here_shards.read_text())["files"], "the data differ already"
    local, cluster = losses((here / "logs" / "metrics.jsonl").read_text()), first.losses
    worst = max(abs(a - b) for a, b in zip(local, cluster, strict=True))
    name = "torch-version"
    first.namespace.apply(pod(name, TRAINER_IMAGE, ["python", "-c", "import torch; print(torch.__version__)"]))
    _, version = first.namespace.exit_of(name, 600)
    print(f"torch here {torch.__version__}, there {version.strip()}; {len(local)} losses, largest difference {worst:g}")
    if version.strip() == torch.__version__:
        assert cluster == local
    else:
        assert worst <= 1e-6


def test_prometheus_saw_both_ranks_step(first: PipelineRun, prometheus: Prometheus) -> None:
    assert first.code == 0, first.log
    run = f'{{run="{first.job.run_name}"}}'
    by_rank = prometheus.query(f"yaongi_step_seconds_count{run}[{first.since}]")
    seen = {series["metric"]["rank"]: [float(value) for _, value in series["values"]] for series in by_rank}
    steps = prometheus.query(f"yaongi_steps_total{run}[{first.since}]")
    print("steps seen by rank:", {rank: (values[0], values[-1], len(values)) for rank, values in seen.items()})
    assert sorted(seen) == ["0", "1"]
    for values in [*seen.values(), [float(value) for _, value in steps[0]["values"]]]:
        assert values == sorted(values) and values[-1] - values[0] >= STEPS / 4, values
    (loss,) = prometheus.query(f"last_over_time(yaongi_loss{run}[{first.since}])")
    assert float(loss["value"][1]) == pytest.approx(first.losses[-1], abs=1.5)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("diverging", ["train.optimizer.clip_norm=null", "train.optimizer.muon.learning_rate=1.0e+30"], "diverged"),
        ("no-claim", ["storage.checkpoints_pvc=absent-pvc"], "'absent-pvc' does not exist"),
        ("no-image", ["cluster.image=localhost/absent:1"], "localhost/absent:1"),
    ],
)
def test_a_run_that_cannot_work_ends_red_and_says_why(
    first: PipelineRun, name: str, changes: list[str], reason: str
) -> None:
    run = PipelineRun.start(first.namespace, name, *changes).finish()
    assert run.code not in (0, -1)
    last = [line for line in run.log.splitlines() if line.startswith("error: ")][-1]
    assert reason in last, last
    running = first.namespace.find(
        "pods", "-l", PYTORCHJOB.selector(job_name(run.job)), "--field-selector", "status.phase=Running"
    )
    assert running == [], "a failed run left workers running"


def test_the_launcher_step_alone_says_that_shards_are_missing(first: PipelineRun) -> None:
    run = PipelineRun.start_training(first.namespace, "no-shards", "data.heldout_fraction=0.03").finish()
    said = [found for line in run.log.splitlines() if (found := FAILED.fullmatch(line))][-1]
    assert run.job.stage_dir("shards") in said["message"] and run.code == int(said["code"]) == ExitCode.DATA

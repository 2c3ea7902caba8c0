"""The pipeline itself on this machine, with a job as small as the data path and the model allow."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kfp import local
from safetensors.torch import load_file
from small_job import small_job

from components.export.component import export
from components.launch.artefacts import finished
from components.tune.component import tune
from manifests.spec import job_from
from trainer.checkpoints.checkpoint import latest_step
from trainer.specbase import read_yaml

YAONGI = Path(sys.executable).with_name("yaongi")
STEPS = [
    "plan",
    "volumes",
    "download",
    "hygiene",
    "tokenizer",
    "shards",
    "train",
    "evaluate",
    "export",
    "tune",
]


# Seven processes import PyTorch in turn, which is slow on a busy machine.
pytestmark = pytest.mark.timeout(1800)


def yaongi(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [YAONGI, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def artefacts(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of all files that the steps wrote, except those that every launch writes again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for tree in ("datasets", "checkpoints")
        for path in sorted((folder / "work" / tree).rglob("*"))
        if path.is_file() and path.name not in ("job.yaml", "train.yaml", "preset.json")
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder in which a small job ran from text to export and was tuned, and the output."""
    folder = tmp_path_factory.mktemp("ran")
    return folder, yaongi("run", small_job(folder, tuned=True), cwd=folder)


def run_dirs(folder: Path) -> tuple[Path, Path]:
    """The directories of the run and of the run that tuned it."""
    runs = folder / "work/checkpoints/runs"
    (tuned,) = runs.glob("small-tune-*")
    (first,) = (run for run in runs.iterdir() if run != tuned)
    return first, tuned


def test_a_job_runs_from_text_to_export_and_a_second_time_does_nothing(ran):
    tmp_path, first = ran
    job = tmp_path / "small.yaml"
    assert first.returncode == 0, first.stdout + first.stderr
    assert [line.split()[1] for line in first.stdout.splitlines() if line.startswith("✓")] == STEPS
    assert "KFP Executor" not in first.stdout
    for label in ("tokens          512 in 4 steps", "loss            ", "bits per byte   ", "report          "):
        assert f"\n{label}" in first.stdout
    run_dir, tuned = run_dirs(tmp_path)
    assert (latest_step(run_dir), latest_step(tuned)) == (4, 2)
    for each in (run_dir, tuned):
        assert (each / "report.html").is_file() and (each / "export/model.safetensors").is_file()
    assert f"beginning with the weights of {run_dir}/checkpoints/step-00000004 (checkpoint)" in first.stdout
    assert "\nheld-out loss   en " in first.stdout and "\nyaongi generate small-tune-" in first.stdout
    (log,) = (path for path in (tmp_path / "work/logs").iterdir() if not path.is_symlink())
    assert "KFP Executor" in log.read_text()
    assert "cleanup" not in first.stdout, "there is nothing to clean up on this machine"

    made = artefacts(tmp_path)
    second = yaongi("run", job, cwd=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert artefacts(tmp_path) == made
    for task in ("train", "evaluate", "export"):
        assert second.stdout.count(f"{task}: unchanged and verified, nothing to do") == 2


def test_the_run_is_shown_beside_the_pipeline(ran, tmp_path):
    """Report, overview, numbers and model that Kubeflow Pipelines gets from the last steps."""
    folder, first = ran
    assert first.returncode == 0, first.stdout + first.stderr
    run_dir, tuned = run_dirs(folder)
    job = job_from(read_yaml(run_dir / "job.yaml"))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    evaluated, exported = (finished(job, task).to_json() for task in ("evaluate", "export"))
    of_tuned = tune(job=job.model_dump_json(), after=exported, pipeline_run="").outputs
    assert Path(of_tuned["overview"].path).read_text().startswith(f"# {tuned.name}\n")
    outputs = export(job=job.model_dump_json(), after=evaluated, pipeline_run="").outputs
    assert outputs["Output"] is True and outputs["result"] == exported

    evaluation = json.loads((run_dir / "eval.json").read_text())
    result = json.loads((run_dir / "result.json").read_text())
    numbers = outputs["metrics"].metadata
    assert numbers["loss_last"] == result["loss_last"] and numbers["steps"] == 4
    assert numbers["bits_per_byte_en"] == evaluation["domains"]["en"]["bits_per_byte"]
    page = Path(outputs["report"].path).read_text()
    assert page == (run_dir / "report.html").read_text() and "<svg" in page
    overview = Path(outputs["overview"].path).read_text()
    assert overview.startswith(f"# {run_dir.name}\n") and "512 in 4 steps" in overview

    model = outputs["model"]
    assert model.uri == (run_dir / "export").as_uri()
    weights = (run_dir / "export" / "model.safetensors").read_bytes()
    assert model.metadata["sha256"] == hashlib.sha256(weights).hexdigest()
    assert model.metadata["checkpoint_digest"] == result["checkpoint_digest"]
    assert (model.metadata["run"], model.metadata["step"]) == (run_dir.name, 4)
    assert model.metadata["data_licences"] == "CC0-1.0"
    tensors = load_file(run_dir / "export" / "model.safetensors").values()
    assert model.metadata["parameters"] <= sum(tensor.numel() for tensor in tensors)
    assert model.metadata["bits_per_byte_code"] == evaluation["domains"]["code"]["bits_per_byte"]


def test_a_step_that_fails_is_one_line_on_stderr_that_names_it(tmp_path):
    job = small_job(tmp_path)
    (tmp_path / "prose.jsonl").unlink()
    done = yaongi("run", job, cwd=tmp_path)
    assert done.returncode == 65
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: download: ") and "prose" in line and "(full log: work/logs/" in line
    assert "Traceback" not in done.stdout
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("✓")] == ["plan", "volumes"]


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_behind_but_a_checkpoint(tmp_path):
    job = small_job(tmp_path, steps=100_000)
    command = [YAONGI, "run", job]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("  step 5/"):
                break
        process.kill()
    deadline = time.monotonic() + 300
    while running := processes_naming(str(tmp_path)):
        assert time.monotonic() < deadline, running
        time.sleep(0.5)
    (run_dir,) = (tmp_path / "work/checkpoints/runs").iterdir()
    assert latest_step(run_dir) >= 5


def processes_naming(text: str) -> list[str]:
    """Command lines, of processes that run, in which `text` occurs."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def stopped(folder: Path, number: signal.Signals, code: int) -> tuple[Path, Path]:
    """Job and run directory of a run that received a signal after its first steps."""
    job = small_job(folder, steps=200, checkpoint={"every_steps": 1000})  # except the one that the stop saves
    with subprocess.Popen(
        [YAONGI, "run", job], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("  step 5/"):
                break
        process.send_signal(number)
        _, error = process.communicate(timeout=600)
    assert process.returncode == code, error
    assert error == "error: stopped; run the same command again to continue\n"
    (run_dir,) = (folder / "work/checkpoints/runs").iterdir()
    assert 5 <= latest_step(run_dir) < 200
    return job, run_dir


@pytest.mark.slow
@pytest.mark.proof
def test_a_terminated_run_has_saved_a_checkpoint(tmp_path):
    """So `yaongi stop` ends runs in test_verbs.py."""
    stopped(tmp_path, signal.SIGTERM, 143)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path):
    job, run_dir = stopped(tmp_path, signal.SIGINT, 130)
    again = yaongi("run", job, "--set", "train.runtime.log_every_steps=100", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    steps = [json.loads(line)["step"] for line in (run_dir / "logs/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))
    written = yaongi("generate", run_dir.name, "--prompt", "bal", "--tokens", "3", cwd=tmp_path)
    assert written.returncode == 0 and written.stdout.startswith("bal"), written.stderr

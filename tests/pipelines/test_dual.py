"""`yaongi dual` and run_h100_dual.sh: flags, the job that they become, and a real run of two CPU processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from small_job import small_job

from manifests.spec import load_job
from pipelines import background
from pipelines.cli import app
from pipelines.dual import checks
from pipelines.dual.dataset import Dataset, find
from pipelines.dual.job import PRESET, Flags, Machine, as_sets, changes
from pipelines.run import local_job
from trainer.errors import DataError, SpecError
from trainer.specbase import changes_from_sets

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
FLAGS = [
    *("--train", "--foreground", "--max-steps", "--dataset-path", "--output-dir", "--logs-dir", "--batch-size"),
    *("--learning-rate", "--max-seq-length", "--save-steps", "--fp16", "--fp32", "--no-compile", "--num-gpus"),
    *("--no-save-initial", "--dry-run", "--verbose"),
]
HERE = dict(os.environ, OMP_NUM_THREADS="1", KUBECONFIG=os.devnull, COLUMNS="200", YAONGI_VERBOSE="")
TWO = Machine(2, 79.1)
SAMPLE = Dataset((), "the sample corpus")


def dual(place: Path, *arguments: str) -> tuple[int, str, str]:
    """The command in a process of its own, in a folder."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    done = subprocess.run(
        command, cwd=place, env=HERE | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout, done.stderr


def wait_until_gone(file: Path) -> None:
    deadline = time.monotonic() + 600
    while file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.2)


OPTIONS = ("--dataset-path", "texts", "--batch-size", "2", "--max-seq-length", "64", "--save-steps", "2")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, tuple[int, str, str]]:
    """A folder with a finished run of four steps, what its start said, and what a second start said meanwhile."""
    place = tmp_path_factory.mktemp("dual")
    (place / "texts").mkdir()
    small_job(place / "texts")
    logs = place / "logs"
    logs.mkdir()
    (logs / "dual.pid").write_text("1\n")  # left by a killed one; the number is of another process now
    options = (*OPTIONS, "--max-steps", "4", "--output-dir", "out", "--logs-dir", "logs", "--learning-rate", "0.003")
    code, said, error = dual(place, "dual", *options)
    assert code == 0, said + error
    second = dual(place, "dual", "--logs-dir", "logs", "--max-steps", "5")
    wait_until_gone(logs / "dual.pid")
    return place, said, second


def test_a_start_shows_checks_configuration_log_and_commands(ran):
    _, said, second = ran
    parts = ["environment", "PyTorch", "GPU", "requirements", "data", "configuration", "first 8 seconds", "▶ plan"]
    assert [said.index(part) for part in parts] == sorted(said.index(part) for part in parts)
    assert "2 files in texts" in said and "2 processes on the CPU" in said and "scaled down" in said
    assert re.search(r"step +4,096 tokens: rows of 64, 2 for each rank at a time, 16 times", said)
    run = re.search(r"run (dual-test-\w+) runs in the background \(process (\d+)\)", said)
    for command in (f"status {run[1]}", f"logs {run[1]} --follow", f"stop {run[1]}", f"resume {run[1]}"):
        assert f"yaongi {command}" in said
    code, _, error = second
    assert code == 69 and error.count("\n") == 1
    assert f"error: yaongi dual already runs as process {run[2]} (logs/dual.pid)" in error


def test_what_the_run_leaves(ran):
    place, _, _ = ran
    out = place / "out"
    models = {"initial_model", "checkpoint-2", "checkpoint-4", "final_model"}
    assert {path.name for path in out.iterdir()} == models | {"model_info.json", "training_info.json"}
    facts = json.loads((out / "training_info.json").read_text())
    assert facts["result"]["steps"] == facts["step"] == 4 and facts["tokens"] == 4 * 4096
    assert facts["result"]["world_size"] == 2
    assert "step 4/4" in (place / "logs/rank-0.log").read_text() and (place / "logs/rank-1.log").is_file()
    assert "✓ export" in (place / "logs/console.log").read_text()
    assert {"metrics.jsonl", "exports.log"} <= {path.name for path in (place / "logs/detail").iterdir()}
    job = load_job(str(next((place / "work/checkpoints/runs").iterdir()) / "job.yaml"))
    assert job.train.optimizer.muon.learning_rate == 0.003 and job.train.checkpoint.every_steps == 2


def test_transformers_and_generate_load_its_models(ran):
    place, _, _ = ran
    transformers = pytest.importorskip("transformers")
    counts = set()
    for name in ("initial_model", "checkpoint-4"):
        model = transformers.AutoModelForCausalLM.from_pretrained(place / "out" / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / "out" / name)
        ids = tokenizer("bal", return_tensors="pt").input_ids
        assert model(ids).logits.shape[:2] == ids.shape
        counts.add(model.num_parameters())
    assert counts == {json.loads((place / "out/model_info.json").read_text())["parameters"]}
    code, text, error = dual(place, "generate", "out/checkpoint-2", "--prompt", "bal", "--tokens", "3")
    assert code == 0 and text.startswith("bal"), error


def test_the_same_command_in_the_foreground_finds_it_done_and_changes_only_the_folder(ran):
    place, _, _ = ran
    options = ("--max-steps", "4", "--logs-dir", "logs", "--learning-rate", "0.003")
    code, said, error = dual(place, "dual", "--foreground", *OPTIONS, *options, "--output-dir", "elsewhere")
    assert code == 0, said + error
    assert "nothing to do" in said and "in the background" not in said
    assert (place / "elsewhere/checkpoint-4/config.json").is_file()
    assert not (place / "logs/dual.pid").exists()


def test_stop_saves_a_checkpoint_and_removes_the_number(ran):
    place, _, _ = ran
    code, said, error = dual(place, "dual", *OPTIONS, "--max-steps", "100", "--learning-rate", "0.004")
    assert code == 0, said + error
    run = re.search(r"run (dual-test-\w+) runs", said)[1]
    metrics = place / "work/dual/logs/detail/metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.is_file() and metrics.stat().st_size):
        assert time.monotonic() < deadline and (place / "work/dual/logs/dual.pid").exists()
        time.sleep(0.1)
    code, said, error = dual(place, "stop", run)
    assert code == 0 and "checkpoint saved at step" in said, said + error
    assert not (place / "work/dual/logs/dual.pid").exists()
    assert background.read(place / "work", run).code == 143


def test_flags_of_both_front_ends_are_those_of_the_list():
    params = typer.main.get_command(app).commands["dual"].params
    assert sorted(name for param in params for name in param.opts) == sorted(FLAGS)
    done = subprocess.run([ROOT / "run_h100_dual.sh", "--help"], env=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^│ +(?:\* +)?(--[a-z0-9-]+)", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted([*FLAGS, "--help"])


def test_a_dry_run_shows_the_job_and_the_same_command_and_starts_nothing(yaongi, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "this_machine", lambda: TWO)
    code, said, error = yaongi("dual", "--dry-run", "--train", "--max-steps", "7", "--fp16", "--no-compile")
    assert code == 0, error
    assert list(tmp_path.iterdir()) == []
    text = said.partition("starts it\n")[2].partition("\n# or")[0]
    (tmp_path / "job.yaml").write_text(text)
    command = said.strip().splitlines()[-1]
    assert command.startswith(f"yaongi local {PRESET} --set ")
    import shlex

    sets = [word for word in shlex.split(command)[3:] if word != "--set"]
    by_file = load_job(str(tmp_path / "job.yaml"))
    by_sets, _ = local_job(PRESET, changes_from_sets(sets), target="local", workdir=Path("work"))
    assert by_file.run_name == by_sets.run_name and f" {by_sets.run_name} " in said
    train = by_sets.train
    assert (train.steps, train.precision.dtype, train.runtime.compile) == (7, "fp16", False)
    assert (by_sets.cluster.gpus_per_node, by_sets.cluster.nodes, by_sets.cluster.gpu_memory_gib) == (2, 1, 79.1)
    assert yaml.safe_load(text)["preset"] == PRESET and len(train.model.layers) == 20


@pytest.mark.parametrize("machine", [Machine(0), Machine(1, 79.1), TWO], ids=["cpu", "one", "two"])
@pytest.mark.parametrize("rows", [None, 1, 3, 16])
@pytest.mark.parametrize("length", [None, 100, 1024])
def test_any_micro_batch_gives_a_step_that_the_ranks_can_share(machine, rows, length):
    flags = Flags(True, SAMPLE, Path("out"), batch_size=rows, max_seq_length=length, max_steps=3)
    fields = changes(flags, machine)
    assert changes_from_sets(list(as_sets(fields))) == fields
    job, _ = local_job(PRESET, fields, target="local", workdir=Path("work"))
    ranks = max(machine.gpus, 1) if machine.gpus else 2
    fitted = job.fitted_spec()
    assert fitted.micro_batches(ranks) >= 1 and job.cluster.world_size == ranks
    preferred = load_job(PRESET).train.batch.tokens_per_step if machine.gpus else 4096
    assert 0.5 <= job.train.batch.tokens_per_step / preferred <= 1.5 or fitted.micro_batches(ranks) == 1
    assert rows in (None, job.train.batch.micro_batch_rows) and length in (None, job.train.seq_len)
    auto = machine.gpus and rows is None
    assert (job.train.batch.micro_batch_rows == "auto") == bool(auto)
    assert not auto or fitted.batch.rows >= 8, "there is a choice of micro-batches"


def test_defaults_and_each_flag_in_the_job():
    def job(**flags):
        flags = {"train": True, "dataset": SAMPLE, "output_dir": Path("out"), "max_steps": 10} | flags
        return local_job(PRESET, changes(Flags(**flags), TWO), target="local", workdir=Path("work"))[0]

    plain, preset = job(), load_job(PRESET)
    assert plain.train.model == preset.train.model
    batch = preset.train.batch.updated({"micro_batch_rows": "auto"})
    assert plain.train.batch == batch and job(batch_size=8).train.batch == preset.train.batch
    assert (plain.train.precision, plain.train.runtime) == (preset.train.precision, preset.train.runtime)
    export = plain.train.export
    assert (export.initial, export.checkpoints, export.folder) == (True, True, str(Path("out").absolute()))
    assert plain.train.checkpoint.every_steps == 500
    assert job(train=False, max_steps=None).train.steps == 10 and job(save_steps=7).train.checkpoint.every_steps == 7
    assert not job(save_initial=False).train.export.initial
    assert job(precision="fp32").train.precision.dtype == "fp32"
    assert job(num_gpus=1).cluster.world_size == 1
    slow = job(learning_rate=5e-6).train
    assert slow.peak_learning_rate == 5e-6 and slow.schedule.final_learning_rate < 5e-6
    assert sorted(plain.data.sources) == ["code", "en", "ko", "math"]


def test_where_text_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(None, train=True).files == () and "sample corpus" in find(None, train=True).said
    assert find(Path("gone"), train=False).said == "the sample corpus: --dataset-path gone is not there"
    (tmp_path / "data").mkdir()
    mixed = tmp_path / "data" / "mixed_pretraining.jsonl"
    mixed.touch()
    assert find(None, train=True).files == (mixed,)
    (tmp_path / "data" / ".hidden").mkdir()
    for name in ("a.txt", "b.parquet", "c.jsonl.gz", "d.png", ".hidden/e.txt"):
        (tmp_path / "data" / name).touch()
    assert find(Path("data"), train=True).files == (mixed,)
    mixed.unlink()
    assert [file.name for file in find(Path("data"), train=True).files] == ["a.txt", "b.parquet", "c.jsonl.gz"]
    assert find(Path("data/a.txt"), train=True).files == (tmp_path / "data/a.txt",)
    with pytest.raises(DataError, match=r"d\.png: its suffix is not a known format"):
        find(Path("data/d.png"), train=False)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--fp16", "--fp32"], 2, "--fp16 and --fp32 exclude each other; give one of them"),
        (["--dataset-path", "empty"], 65, "--dataset-path empty: the folder has no text; put mixed_pretraining.jsonl"),
        (["--train", "--dataset-path", "gone"], 65, "--dataset-path gone: there is no such file or folder; check"),
        (["--num-gpus", "3"], 2, "--num-gpus 3: this machine has 2 GPUs; --num-gpus 2"),
        (["--learning-rate", "0"], 2, "--learning-rate 0: a rate lies between 0 and 1"),
        (["--logs-dir", "file/logs"], 74, "file/logs"),
    ],
)
def test_bad_input_is_one_line_with_the_fix(yaongi, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.setattr(checks, "this_machine", lambda: TWO)
    monkeypatch.setattr(checks, "environment", lambda *_: [])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    found, _, error = yaongi("dual", *arguments)
    assert found == code and said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "work/processes").exists()


def test_a_run_that_fails_in_its_first_seconds_is_told_at_once(tmp_path):
    (tmp_path / "mixed_pretraining.jsonl").write_text('{"content": "a text"}\n')
    code, said, error = dual(tmp_path, "dual")
    assert code == 65 and "first 8 seconds" in said and "in the background" not in said
    assert error.count("\n") == 1 and "no column 'text'; columns are content" in error


def test_more_gpus_than_there_are():
    flags = Flags(False, SAMPLE, Path("out"), num_gpus=2)
    with pytest.raises(SpecError, match=r"no GPU that PyTorch sees; leave it out to try on the CPU"):
        changes(flags, Machine(0))
    with pytest.raises(SpecError, match=r"this machine has 1 GPU; --num-gpus 1"):
        changes(flags, Machine(1))


def test_an_environment_that_lacks_something_starts_nothing(yaongi, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["no-such-package>=3; extra == 'train'"])
    code, said, error = yaongi("dual")
    assert code == 69 and "missing: no-such-package" in said and "marked `no`" in error
    assert not (tmp_path / "work/processes").exists()

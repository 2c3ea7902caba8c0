import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from manifests.spec import job_from, load_job, preset_names
from pipelines import cli
from pipelines.compile import COMMITTED
from pipelines.doctor import machine
from pipelines.run import local_job
from trainer import __version__
from trainer.pretrained import find, refuse_misfit
from trainer.specbase import deep_merge


def test_the_version_is_the_packages(yaongi):
    assert yaongi("--version") == (0, f"yaongi {__version__}\n", "")


def test_the_module_can_be_run_where_the_command_is_not_installed():
    command = [sys.executable, "-m", "pipelines.cli", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"yaongi {__version__}\n"


def test_texts_are_printed_where_the_terminal_is_not_utf8(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "app", lambda: print("river 강"))
    cli.main()
    terminal.flush()
    assert terminal.buffer.getvalue() == b"river \\uac15\n"


@pytest.mark.parametrize("command", ["run", "train", "render", "describe", "submit"])
def test_an_unknown_field_is_one_line_that_names_the_nearest(yaongi, command):
    code, _, error = yaongi(command, "tiny", "--set", "train.stepz=5")
    assert (code, error) == (2, "error: tiny: train.stepz: unknown field; did you mean 'train.steps'?\n")


def test_several_problems_of_a_job_file_are_named_with_the_file(yaongi, tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: tiny\nname: Mine\ntrain: {steps: 0}\n")
    code, _, error = yaongi("run", "mine.yaml")
    assert code == 2
    assert error.count("\n") == 1
    assert "mine.yaml: name: " in error and "mine.yaml: train.steps: " in error


def test_a_job_that_is_neither_preset_nor_file_lists_the_presets(yaongi):
    code, _, error = yaongi("run", "tinny")
    assert code == 2
    listed = ", ".join(preset_names())
    assert error.startswith(f"error: 'tinny' is neither a preset ({listed}) nor a file") and error.count("\n") == 1
    assert error.endswith("; did you mean 'tiny'?\n")
    assert error == yaongi("run", "tinny", "--target", "kubernetes")[2]


def test_a_job_file_that_is_not_there_is_named_as_it_was_looked_for(yaongi, tmp_path):
    code, _, error = yaongi("run", "../jobs/mine.yaml")
    assert code == 2 and error.endswith(f" {tmp_path.parent}/jobs/mine.yaml was tried\n")


def test_places_are_named_without_the_way_to_them(tmp_path, monkeypatch):
    """They are also the files that the system finds if a folder in the path is a link."""
    (tmp_path / "there/below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("there/below")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there/mine.yaml").write_text("preset: tiny\n")
    job, _ = local_job("link/../mine.yaml", {}, target="local", workdir=Path("link/../w"))
    assert job.storage.datasets_dir == f"{tmp_path}/there/w/datasets"
    assert job.storage.sources_dir == f"{tmp_path}/there"
    job, _ = local_job("tiny", {}, target="local", workdir=Path("link/w"))
    assert job.storage.datasets_dir == f"{tmp_path}/link/w/datasets"


@pytest.mark.parametrize("verb", ["run", "local", "prepare"])
def test_a_workdir_that_cannot_be_made_is_an_error_of_the_volume(yaongi, monkeypatch, verb):
    monkeypatch.setattr("pipelines.refusals.refuse", lambda job, changes: None)
    monkeypatch.setattr("components.plan.feasible.refuse_hopeless", lambda job, train: None)
    code, _, error = yaongi(verb, "tiny", "--workdir", "/proc/x")
    assert code == 74 and error.count("\n") == 1
    assert error.startswith("error: /proc/x/") and "give another place" in error
    code, said, _ = yaongi("doctor", "--workdir", "/proc/x")
    assert code == 1 and re.search(r"disk +no +no folder can be made in /proc ", said)


def test_a_target_that_does_not_exist_names_those_that_do(yaongi):
    code, _, error = yaongi("run", "tiny", "--target", "slurm")
    assert code == 2
    assert "cluster.target" in error and "'kubernetes' or 'local'" in error


def test_a_volume_that_is_not_mounted_here_is_named(yaongi, tmp_path):
    (tmp_path / "taken").write_text("a file")
    place = f"storage.datasets_dir={tmp_path}/taken/datasets"
    code, _, error = yaongi("run", "tiny", "--target", "kubernetes", "--set", place)
    assert code == 2
    assert error.startswith(f"error: storage.datasets_dir: {tmp_path}/taken/datasets is not a folder here; ")
    assert "claim 'llm-datasets-pvc'" in error and "--workdir" not in error and error.count("\n") == 1


def test_a_workdir_that_cannot_be_written_is_named(yaongi, tmp_path):
    (tmp_path / "taken").write_text("a file")
    code, _, error = yaongi("run", "tiny", "--workdir", str(tmp_path / "taken"))
    assert code == 2
    assert error.startswith("error: storage.datasets_dir: ") and "give another --workdir" in error


def test_verbose_adds_the_traceback_and_nothing_else_does(yaongi):
    assert "Traceback" not in yaongi("render", "tinny")[2]
    code, _, error = yaongi("render", "tinny", "--verbose")
    assert code == 2
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: 'tinny' is neither")


def test_presets_are_listed(yaongi):
    _, output, _ = yaongi("presets")
    assert [line.split()[0] for line in output.splitlines()] == preset_names()
    assert {"tiny", "h100-4b", "dual-h100-dense", "qwen3-30b-a3b", "nemotron-3-nano"} <= set(preset_names())


def test_describe_shows_what_trains_each_parameter(yaongi):
    _, output, _ = yaongi("describe", "h100-4b", "--optimizers", "--set", "train.optimizer.muon.teon_layers=2")
    lines = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    partner = "layers.5.0.mixer.v_proj.weight"
    assert lines["layers.11.0.mixer.v_proj.weight"] == ["512×2048", "muon", "8", "×1", "yes", partner]
    assert lines["embedding.weight"][1] == "adamw" and len(lines) == len(output.splitlines())


def test_describe_shows_the_requested_model(yaongi):
    _, output, _ = yaongi("describe", "h100-4b")
    assert "4,197,820,016" in output and "603,252,208" in output


def test_describe_shows_the_shortest_time_on_a_gpu(yaongi):
    _, output, _ = yaongi("describe", "h100-4b-interleaved", "--gpu", "h100")
    assert "Mamba-2 scan" in output and "tokens/s on each GPU" in output
    assert yaongi("describe", "tiny", "--gpu", "h9")[2].startswith("error: --gpu h9: not known; known are h100-pcie, ")


def test_describe_prints_a_trained_models_section_for_a_job(yaongi, tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-6,
    }
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, output, _ = yaongi("describe", str(tmp_path))
    section = yaml.safe_load(output.partition("For a job that begins with it:")[2])
    job = job_from({"preset": "tiny"}, deep_merge(section, {"train": {"init_from": str(tmp_path)}}))
    assert code == 0
    refuse_misfit(find(tmp_path), job.train.model)
    assert "is a model, which has no micro-batches" in yaongi("describe", str(tmp_path), "--gpu", "h100")[2]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma9"}))
    assert yaongi("describe", str(tmp_path))[2].startswith(f"error: {tmp_path}/config.json: model_type 'gemma9' is not")


def test_render_prints_what_kubectl_takes(yaongi):
    _, output, _ = yaongi("render", "tiny", "--set", "cluster.nodes=1", "--set", "cluster.image=mine:7")
    *needs, job = yaml.safe_load_all(output)
    assert [item["kind"] for item in (*needs, job)] == ["ConfigMap", "NetworkPolicy", "PyTorchJob"]
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 1
    assert worker["template"]["spec"]["containers"][0]["image"] == "mine:7"

    _, output, _ = yaongi("render", "tiny", "--set", "cluster.job=trainjob")
    kinds = [item["kind"] for item in yaml.safe_load_all(output)]
    assert kinds == ["ConfigMap", "NetworkPolicy", "TrainingRuntime", "TrainJob"], "the order of creation"
    assert "activeDeadlineSeconds" not in list(yaml.safe_load_all(output))[-1]["spec"], "2.1 does not know it"
    _, output, _ = yaongi("render", "tiny", "--set", "cluster.job=trainjob", "--trainer-version", "2.3")
    assert list(yaml.safe_load_all(output))[-1]["spec"]["activeDeadlineSeconds"] > 0
    code, _, error = yaongi("render", "tiny", "--trainer-version", "2.3")
    assert code == 2 and error.startswith("error: --trainer-version 2.3 is about TrainJobs")


def test_render_refuses_a_task_that_does_not_exist(yaongi):
    code, output, error = yaongi("render", "tiny", "--task", "foo")
    assert (code, output) == (2, "")
    assert "'foo'" in error and "train" in error and "export" in error
    config_map, *_ = yaml.safe_load_all(yaongi("render", "tiny", "--task", "evaluate")[1])
    assert config_map["metadata"]["name"].endswith("-evaluate")


def test_submit_takes_both_images(yaongi, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "pipelines.submit.submit", lambda job, changes, **options: asked.update(options, changes=changes)
    )
    yaongi("submit", "tiny", "--image", "r/pipeline:2", "--set", "cluster.image=r/trainer:2")
    assert asked["image"] == "r/pipeline:2" and asked["changes"] == {"cluster": {"image": "r/trainer:2"}}


def test_compile_writes_the_committed_pipeline(yaongi, tmp_path):
    assert yaongi("compile", "new.yaml")[0] == 0
    assert (tmp_path / "new.yaml").read_text() == COMMITTED.read_text()


def test_compile_makes_the_folder_and_refuses_one_for_the_file(yaongi, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.compile.compiled", lambda: "compiled")
    assert yaongi("compile", "out/for-kfp/new.yaml")[:2] == (0, "wrote out/for-kfp/new.yaml\n")
    assert (tmp_path / "out/for-kfp/new.yaml").read_text() == "compiled"
    code, _, error = yaongi("compile", "out/for-kfp")
    assert code == 2 and "'out/for-kfp' is a directory" in error
    assert [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()] == ["new.yaml"]


def test_generate_needs_an_exported_model(yaongi, tmp_path):
    trained = tmp_path / "work/checkpoints/runs/mine-0123abcd"
    (trained / "checkpoints").mkdir(parents=True)
    code, _, error = yaongi("generate", "mine", "--prompt", "a")
    assert code == 2 and error.endswith("no exported model; make it first: yaongi resume mine-0123abcd\n")
    code, _, error = yaongi("generate", "nothing", "--prompt", "a")
    assert code == 2 and error == "error: no run 'nothing' in work; known: mine-0123abcd\n"


@pytest.mark.parametrize(
    ("asked", "code", "first"),
    [
        (["train"], 65, "prepare tiny"),
        (["evaluate"], 2, "run tiny"),
        (["export"], 2, "run tiny"),
        (["data", "verify"], 65, "prepare tiny --until download"),
        (["data", "stats"], 65, "prepare tiny"),
        (["data", "cat", "--source", "ko"], 65, "prepare tiny"),
        (["data", "peek"], 65, "prepare tiny"),
    ],
)
def test_what_has_to_be_done_first_is_a_whole_command(yaongi, tmp_path, asked, code, first):
    asked = [*asked, "tiny", "--set", "train.seed=1", "--workdir", "its data"]
    ended, _, error = yaongi(*asked)
    assert (ended, error.count("\n")) == (code, 1)
    assert error.endswith(f": yaongi {first} --set train.seed=1 --workdir 'its data'\n")
    assert list(tmp_path.iterdir()) == [], "no run has begun"


def test_a_run_is_tuned_once_it_is_trained(yaongi, tmp_path):
    chat = "tune.sources={c: {licence: MIT, origin: {kind: files, paths: [sample://chat.jsonl.gz]}}}"
    asked = ["tiny", "--set", "tune.steps=1", "--set", chat]
    code, _, error = yaongi("tune", *asked)
    assert code == 2 and error.count("\n") == 1
    assert "which is to be tuned, has no checkpoint of step 120; train it first: " in error
    assert error.split(": ", 2)[-1].startswith("yaongi run tiny --set tune.steps=1 --set ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [["status"], ["logs"], ["generate", "--prompt", "a"]])
def test_a_job_that_has_no_run_yet_is_told_how_to_begin_one(yaongi, monkeypatch, asked):
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    code, _, error = yaongi(*asked, "tiny", "--workdir", "w")
    assert code == 2 and error == "error: no run 'tiny' in w; none is known; begin it: yaongi run tiny --workdir w\n"


def test_an_export_that_is_to_come_is_made_by_the_job_that_was_named(yaongi, tmp_path):
    name = load_job("tiny").run_name
    (tmp_path / "w/checkpoints/runs" / name / "checkpoints").mkdir(parents=True)
    code, _, error = yaongi("generate", "tiny", "--prompt", "a", "--workdir", "w")
    assert code == 2 and error.endswith(": yaongi run tiny --workdir w\n")


def test_submit_needs_a_host_that_answers(yaongi, monkeypatch):
    monkeypatch.delenv("KFP_HOST", raising=False)
    assert yaongi("submit", "tiny")[2].startswith("error: --host is missing")
    code, _, error = yaongi("submit", "tiny", "--host", "http://localhost:9")
    assert code == 69
    assert (
        error.startswith("error: Kubeflow Pipelines does not answer at http://localhost:9") and error.count("\n") == 1
    )


def test_doctor_tells_what_is_missing_without_failing_for_it(yaongi, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    code, output, _ = yaongi("doctor")
    assert code == 0
    assert re.search(r"PyTorch +ok ", output) and "cluster  missing  no cluster to launch on" in output


@pytest.mark.parametrize("text", ["a: {", "[1]", "hello", "", "current-context: x\ncontexts: 3\n"])
def test_doctor_tells_a_broken_kubeconfig_in_its_line(yaongi, monkeypatch, tmp_path, text):
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("COLUMNS", "1000")
    code, output, error = yaongi("doctor")
    assert (code, error) == (0, "")
    assert [line.split()[1:6] for line in output.splitlines() if line.lstrip().startswith("cluster ")] == [
        ["missing", "no", "cluster", "to", "launch"]
    ]


def test_doctor_fails_on_a_machine_that_cannot_run(yaongi, monkeypatch):
    monkeypatch.setattr(machine, "MIN_FREE_GIB", 1e9)
    code, output, _ = yaongi("doctor")
    assert code == 1
    assert re.search(r"disk +no ", output)


def test_help_lists_every_verb_and_begins_with_run(yaongi):
    code, shown, _ = yaongi("--help")
    verbs = re.findall(r"^│ ([a-z]+) ", shown.partition("Commands")[2], re.M)
    assert code == 0 and verbs == list(cli.VERBS)

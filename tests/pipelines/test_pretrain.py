import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import components
from components.plan.step import AS_PRESET
from pipelines.compile import COMMITTED

ROOT = Path(components.__file__).parents[1]
STEPS = {"plan", "download", "hygiene", "tokenizer", "shards", "train", "evaluate", "export", "summary"}
LOOP = "encode-ranges"  # its only step, `encode`, runs once for each of job.shards.pods


@pytest.fixture(scope="module")
def documents():
    return list(yaml.safe_load_all(COMMITTED.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def tasks(documents):
    return {task["taskInfo"]["name"]: task for task in documents[0]["root"]["dag"]["tasks"].values()}


@pytest.fixture(scope="module")
def executors(documents):
    return documents[0]["deploymentSpec"]["executors"]


def test_the_committed_pipeline_is_the_compiled_one(tmp_path):
    # In a process of its own, without this machine's image names.
    code = "import sys; from pathlib import Path; from pipelines.compile import write; write(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "new.yaml"], check=True, env={"PATH": "/usr/bin:/bin"})
    assert (tmp_path / "new.yaml").read_text() == COMMITTED.read_text(), "pretrain.yaml is stale; run `make gen`"


def test_steps_follow_one_another(documents, tasks):
    names = {key: task["taskInfo"]["name"] for key, task in documents[0]["root"]["dag"]["tasks"].items()}
    after = {name: {names[key] for key in task.get("dependentTasks", [])} - {"plan"} for name, task in tasks.items()}
    assert after == {
        "plan": set(),
        "download": set(),
        "hygiene": {"download"},
        "tokenizer": {"hygiene"},
        LOOP: {"tokenizer"},
        "shards": {"hygiene", "tokenizer", LOOP},
        "train": {"shards"},
        "evaluate": {"train"},
        "export": {"evaluate"},
        "summary": {"export"},
    }


def test_no_step_is_cached_by_the_backend(documents, tasks):
    assert tasks.keys() == STEPS | {LOOP}
    inside = documents[0]["components"][tasks[LOOP]["componentRef"]["name"]]["dag"]["tasks"]
    assert list(inside) == ["encode"]
    for name, task in (tasks | inside).items():
        assert name == LOOP or not task["cachingOptions"].get("enableCache"), name


def test_every_step_runs_our_image_and_installs_nothing(executors):
    for name, executor in executors.items():
        assert executor["container"]["image"] == "{{$.inputs.parameters['pipelinechannel--image']}}", name
        assert "pip install" not in " ".join(executor["container"]["command"]), name


def test_every_step_mounts_the_claims_that_the_form_names(documents, executors):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert platform.keys() == executors.keys()
    for name, settings in platform.items():
        mounts = {m["mountPath"]: m["pvcNameParameter"]["componentInputParameter"] for m in settings["pvcMount"]}
        here = "pipelinechannel--" if name == "exec-encode" else ""  # what a loop calls the pipeline's fields
        claims = {"/mnt/datasets": f"{here}datasets_pvc", "/mnt/checkpoints": f"{here}checkpoints_pvc"}
        assert mounts == claims, name
        assert settings["imagePullPolicy"] == "IfNotPresent", name
        assert settings["securityContext"]["runAsUser"] == "1000", name


def test_only_the_steps_that_fetch_see_the_hubs_token_and_none_needs_it(documents):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    secrets = {name.removeprefix("exec-"): settings.get("secretAsEnv") for name, settings in platform.items()}
    assert {name for name, found in secrets.items() if found} == {"download", "hygiene"}
    for name in ("download", "hygiene"):
        (secret,) = secrets[name]
        assert secret["secretName"] == "huggingface" and secret["optional"] is True
        assert secret["keyToEnv"] == [{"envVar": "HF_TOKEN", "secretKey": "token"}]


def test_launchers_know_their_pod_so_that_jobs_belong_to_it(documents):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    launchers = [settings for name, settings in platform.items() if name.startswith("exec-launch")]
    assert len(launchers) == 3
    for settings in launchers:
        assert settings["fieldPathAsEnv"] == [{"name": "POD_NAME", "fieldPath": "metadata.name"}]


def test_the_form_explains_each_of_its_fields_and_works_as_it_is(documents):
    fields = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert fields.keys() == {"preset", "image", "overrides", *AS_PRESET}
    for name, field in fields.items():
        assert field["isOptional"] and "defaultValue" in field and field["description"].strip(), name


def test_the_pipeline_assumes_no_namespace():
    assert "namespace" not in COMMITTED.read_text()


def test_component_files_hold_nothing_but_the_wrapper():
    files = sorted((ROOT / "components").glob("*/component.py"))
    assert len(files) == 7
    for file in files:
        lines = [
            line for line in file.read_text().splitlines() if line.strip() and not line.startswith(("import", "from"))
        ]
        assert len(lines) <= 25, file


def test_the_dag_fits_on_a_screen():
    from pipelines import pretrain

    assert len(inspect.getsource(pretrain).splitlines()) <= 110

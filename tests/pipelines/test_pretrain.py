import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import components
from components.plan.step import AS_PRESET
from manifests.clusterspec import ClusterSpec
from manifests.spec import preset, preset_names
from pipelines.compile import COMMITTED

ROOT = Path(components.__file__).parents[1]
STEPS = {"plan", "download", "hygiene", "tokenizer", "shards", "train", "evaluate", "export", "tune", "summary"}
LOOP = "encode-ranges"  # its only step, `encode`, runs once for each of job.shards.pods


@pytest.fixture(scope="module")
def documents():
    return list(yaml.safe_load_all(COMMITTED.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def dag(documents):
    """The steps that the exit handler follows."""
    return documents[0]["components"]["comp-exit-handler-1"]["dag"]["tasks"]


@pytest.fixture(scope="module")
def tasks(dag):
    return {task["taskInfo"]["name"]: task for task in dag.values()}


@pytest.fixture(scope="module")
def executors(documents):
    return documents[0]["deploymentSpec"]["executors"]


def test_the_committed_pipeline_is_the_compiled_one(tmp_path):
    # In a separate process, without this machine's image names.
    code = "import sys; from pathlib import Path; from pipelines.compile import write; write(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "new.yaml"], check=True, env={"PATH": "/usr/bin:/bin"})
    assert (tmp_path / "new.yaml").read_text() == COMMITTED.read_text(), "pretrain.yaml is stale; run `make gen`"


def test_steps_follow_one_another(dag, tasks):
    names = {key: task["taskInfo"]["name"] for key, task in dag.items()}
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
        "tune": {"export"},
        "summary": {"tune"},
    }


def test_no_step_is_cached_by_the_backend(documents, tasks):
    assert tasks.keys() == STEPS | {LOOP}
    inside = documents[0]["components"][tasks[LOOP]["componentRef"]["name"]]["dag"]["tasks"]
    assert list(inside) == ["encode"]
    outside = documents[0]["root"]["dag"]["tasks"]
    assert set(outside) == {"exit-handler-1", "cleanup"}
    for name, task in (tasks | inside | {"cleanup": outside["cleanup"]}).items():
        assert name == LOOP or not task["cachingOptions"].get("enableCache"), name


def test_every_step_runs_our_image_and_installs_nothing(executors):
    for name, executor in executors.items():
        assert executor["container"]["image"] == "{{$.inputs.parameters['pipelinechannel--image']}}", name
        assert "pip install" not in " ".join(executor["container"]["command"]), name


def test_every_step_but_the_cleanup_mounts_the_claims_that_the_form_names(documents, executors):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert platform.keys() == executors.keys()
    for name, settings in platform.items():
        mounts = {
            m["mountPath"]: m["pvcNameParameter"]["componentInputParameter"] for m in settings.get("pvcMount", [])
        }
        here = "pipelinechannel--"  # what loops and exit handlers call the pipeline's fields
        claims = {"/mnt/datasets": f"{here}datasets_pvc", "/mnt/checkpoints": f"{here}checkpoints_pvc"}
        assert mounts == ({} if name == "exec-cleanup" else claims), name  # no volume can keep it from its work
        assert settings["imagePullPolicy"] == "IfNotPresent", name
        assert settings["securityContext"]["runAsUser"] == "1000", name


def test_every_claims_name_is_known_where_the_backend_looks_it_up(documents):
    """Among the inputs of the group of steps that a step belongs to, not of the step."""
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    components = documents[0]["components"]
    groups = [documents[0]["root"], *(found for found in components.values() if "dag" in found)]
    asked = 0
    for group in groups:
        for task in group["dag"]["tasks"].values():
            label = components[task["componentRef"]["name"]].get("executorLabel")
            for mount in executors.get(label, {}).get("pvcMount", []):
                asked += 1
                assert mount["pvcNameParameter"]["componentInputParameter"] in group["inputDefinitions"]["parameters"]
    assert asked == 2 * (len(executors) - 1)


def test_what_comes_last_comes_always_and_knows_the_jobs_of_this_run(documents, dag):
    """kfp.local treats a step as an exit handler's only if it takes the status of the others as input."""
    last = documents[0]["root"]["dag"]["tasks"]["cleanup"]
    assert last["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert last["dependentTasks"] == ["exit-handler-1"]
    inputs = last["inputs"]["parameters"]
    assert inputs["ended"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    launchers = [task for key, task in dag.items() if key.startswith(("launch", "tune"))]
    marks = [task["inputs"]["parameters"]["pipeline_run"] for task in launchers]
    # Resolved by the backend and by kfp.local alike, but only where it is the whole value.
    assert marks == [inputs["pipeline_run"]] * 4 == [{"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}] * 4


def test_a_step_that_hangs_ends_and_launchers_have_clocks_of_their_own(documents):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    limits = {
        name.removeprefix("exec-"): int(found.get("activeDeadlineSeconds", 0)) for name, found in platform.items()
    }
    assert {name for name, seconds in limits.items() if not seconds} == {"launch", "launch-2", "launch-3", "tune"}
    assert limits["cleanup"] == limits["plan"] == limits["summary"] == 1800
    assert limits["download"] == limits["hygiene"] == limits["tokenizer"] == limits["encode"] == limits["shards"]


def test_the_default_images_have_tags_that_no_node_pulls_anew(documents):
    """A tag of `latest`, or none, makes Kubernetes pull before every step."""
    images = [documents[0]["root"]["inputDefinitions"]["parameters"]["image"]["defaultValue"]]
    images += [preset(name).get("cluster", {}).get("image", ClusterSpec().image) for name in preset_names()]
    for image in images:
        assert re.fullmatch(r"[^:]+:(?!latest$)[\w.-]+", image.rpartition("/")[2]), image


def test_only_the_steps_that_fetch_see_the_hubs_token_and_none_needs_it(documents):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    secrets = {name.removeprefix("exec-"): settings.get("secretAsEnv") for name, settings in platform.items()}
    assert {name for name, found in secrets.items() if found} == {"download", "hygiene", "tune"}
    for name in ("download", "hygiene", "tune"):
        (secret,) = secrets[name]
        assert secret["secretName"] == "huggingface" and secret["optional"] is True
        assert secret["keyToEnv"] == [{"envVar": "HF_TOKEN", "secretKey": "token"}]


def test_launchers_know_their_pod_so_that_jobs_belong_to_it(documents):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    launchers = [settings for name, settings in platform.items() if name.startswith(("exec-launch", "exec-tune"))]
    assert len(launchers) == 4
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
    assert len(files) == 9
    for file in files:
        lines = [
            line for line in file.read_text().splitlines() if line.strip() and not line.startswith(("import", "from"))
        ]
        assert len(lines) <= 25, file


def test_the_dag_fits_on_a_screen():
    from pipelines import pretrain

    assert len(inspect.getsource(pretrain).splitlines()) <= 110


def test_every_step_is_labelled_and_only_those_that_fetch_data_reach_the_web(documents):
    """The network policies and monitors select steps by these labels."""
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    labels = {name.removeprefix("exec-"): found["podMetadata"]["labels"] for name, found in platform.items()}
    assert labels.keys() == {name.removeprefix("exec-") for name in documents[0]["deploymentSpec"]["executors"]}
    assert {found["app.kubernetes.io/name"] for found in labels.values()} == {"yaongi-step"}
    fetching = {name for name, found in labels.items() if found.get("yaongi/egress") == "hub"}
    assert fetching == {"download", "hygiene", "tune"}

import ast
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
STEPS = {"plan", "data", "train", "evaluate", "export"}
POOL, TUNING = "encode-in-several-pods", "to-tune"  # groups that most runs skip
LAUNCHERS = {"train", "evaluate", "export", "tune"}
LOOP = "ranges"  # its only step, `encode`, runs once for each of job.shards.pods


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
def inside(documents, tasks):
    """The tasks of a group by its name, by their names."""

    def found(name, within=tasks):
        group = documents[0]["components"][within[name]["componentRef"]["name"]]["dag"]["tasks"]
        return {task["taskInfo"]["name"]: task for task in group.values()}

    return found


@pytest.fixture(scope="module")
def executors(documents):
    return documents[0]["deploymentSpec"]["executors"]


def test_the_committed_pipeline_is_the_compiled_one(tmp_path):
    # In a separate process, without this machine's image names.
    code = "import sys; from pathlib import Path; from pipelines.compile import write; write(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "new.yaml"], check=True, env={"PATH": "/usr/bin:/bin"})
    assert (tmp_path / "new.yaml").read_text() == COMMITTED.read_text(), "pretrain.yaml is stale; run `make gen`"


def test_steps_follow_one_another(dag, tasks, inside):
    names = {key: task["taskInfo"]["name"] for key, task in dag.items()}
    after = {name: {names[key] for key in task.get("dependentTasks", [])} for name, task in tasks.items()}
    assert after == {
        "plan": set(),
        "data": {"plan"},
        POOL: {"data"},
        "train": {"data", POOL},
        "evaluate": {"data", "train"},
        "export": {"data", "evaluate"},
        TUNING: {"data", "export"},
    }
    assert list(inside(TUNING)) == ["tune"]
    pool = inside(POOL)
    assert pool.keys() == {LOOP, "shards"} and list(inside(LOOP, pool)) == ["encode"]
    assert pool["shards"]["dependentTasks"] == [pool[LOOP]["componentRef"]["name"].removeprefix("comp-")]


def test_a_run_without_tuning_and_with_one_encoder_has_as_few_pods_as_its_parts_allow(documents, tasks):
    """Two for a task and one for a group, about ten seconds each; a group that is skipped costs its one."""
    groups = {name for name, task in tasks.items() if "parameterIterator" in task or "condition" in str(task)}
    assert groups == {POOL, TUNING}
    steps = len(tasks) - len(groups) + 1  # and the cleanup
    assert 2 * steps + len(groups) + 2 == 16  # two: the run itself, and what the exit handler follows


def test_the_user_sees_the_names_that_the_steps_log_under(documents):
    """And each task is explained in its page."""
    for name, task in all_tasks(documents).items():
        component = documents[0]["components"][task["componentRef"]["name"]]
        if "executorLabel" in component:
            assert task["taskInfo"]["name"] == name.rstrip("-0123456789")
    for name, executor in documents[0]["deploymentSpec"]["executors"].items():
        source = " ".join(executor["container"]["command"])
        step = name.removeprefix("exec-")
        assert f'step("{step}")' in source or step in ("data", "encode"), name


def all_tasks(documents):
    groups = [documents[0]["root"], *(found for found in documents[0]["components"].values() if "dag" in found)]
    return {name: task for group in groups for name, task in group["dag"]["tasks"].items()}


def test_no_step_is_cached_by_the_backend(documents, tasks):
    assert tasks.keys() == STEPS | {POOL, TUNING}
    assert set(documents[0]["root"]["dag"]["tasks"]) == {"exit-handler-1", "cleanup"}
    found = all_tasks(documents)
    assert len(found) == len(STEPS) + 8  # encode, shards, tune, cleanup and four groups
    for name, task in found.items():
        is_step = "executorLabel" in documents[0]["components"][task["componentRef"]["name"]]
        assert not is_step or not task["cachingOptions"].get("enableCache"), name


def test_every_step_runs_our_image_and_installs_nothing(executors):
    for name, executor in executors.items():
        assert executor["container"]["image"] == "{{$.inputs.parameters['pipelinechannel--image']}}", name
        assert "pip install" not in " ".join(executor["container"]["command"]), name


def test_every_step_between_plan_and_cleanup_mounts_the_claims_that_the_form_names(documents, executors):
    """A claim that is absent keeps a pod from starting: `plan` says so, and the cleanup works without."""
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert platform.keys() == executors.keys()
    for name, settings in platform.items():
        mounts = {
            m["mountPath"]: m["pvcNameParameter"]["componentInputParameter"] for m in settings.get("pvcMount", [])
        }
        here = "pipelinechannel--"  # what loops and exit handlers call the pipeline's fields
        claims = {"/mnt/datasets": f"{here}datasets_pvc", "/mnt/checkpoints": f"{here}checkpoints_pvc"}
        assert mounts == ({} if name in ("exec-plan", "exec-cleanup") else claims), name
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
    assert asked == 2 * (len(executors) - 2)


def test_what_comes_last_comes_always_and_knows_the_jobs_of_this_run(documents):
    """kfp.local treats a step as an exit handler's only if it takes the status of the others as input."""
    last = documents[0]["root"]["dag"]["tasks"]["cleanup"]
    assert last["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert last["dependentTasks"] == ["exit-handler-1"]
    inputs = last["inputs"]["parameters"]
    assert inputs["ended"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    launchers = [task for key, task in all_tasks(documents).items() if key in LAUNCHERS]
    marks = [task["inputs"]["parameters"]["pipeline_run"] for task in launchers]
    # Resolved by the backend and by kfp.local alike, but only where it is the whole value.
    assert marks == [inputs["pipeline_run"]] * 4 == [{"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}] * 4


def test_a_step_that_hangs_ends_and_launchers_have_clocks_of_their_own(documents):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    limits = {
        name.removeprefix("exec-"): int(found.get("activeDeadlineSeconds", 0)) for name, found in platform.items()
    }
    assert {name for name, seconds in limits.items() if not seconds} == LAUNCHERS
    assert limits["cleanup"] == limits["plan"] == 1800
    assert limits["data"] == limits["encode"] == limits["shards"] > 86_400


def test_the_default_images_have_tags_that_no_node_pulls_anew(documents):
    """A tag of `latest`, or none, makes Kubernetes pull before every step."""
    images = [documents[0]["root"]["inputDefinitions"]["parameters"]["image"]["defaultValue"]]
    images += [preset(name).get("cluster", {}).get("image", ClusterSpec().image) for name in preset_names()]
    for image in images:
        assert re.fullmatch(r"[^:]+:(?!latest$)[\w.-]+", image.rpartition("/")[2]), image


def test_only_the_steps_that_fetch_see_the_hubs_token_and_none_needs_it(documents):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    secrets = {name.removeprefix("exec-"): settings.get("secretAsEnv") for name, settings in platform.items()}
    assert {name for name, found in secrets.items() if found} == {"data", "tune"}
    for name in ("data", "tune"):
        (secret,) = secrets[name]
        assert secret["secretNameParameter"] == {"componentInputParameter": "pipelinechannel--hub_secret"}
        assert secret["optional"] is True
        assert secret["keyToEnv"] == [{"envVar": "HF_TOKEN", "secretKey": "token"}]
    form = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert form["hub_secret"]["defaultValue"] == ClusterSpec().hub_secret


def test_launchers_know_their_pod_so_that_jobs_belong_to_it(documents):
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    launchers = [settings for name, settings in platform.items() if name.removeprefix("exec-") in LAUNCHERS]
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
    assert len(files) == 10
    for file in files:
        for function in (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)):
            first = function.body[1] if len(function.body) > 1 else function.body[0]  # after the docstring
            assert (function.end_lineno or 0) - first.lineno < 16, f"{file}: {function.name}"


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
    assert fetching == {"data", "tune"}

"""What every rendered object must hold, whatever the spec: names that fit, restricted pods, a rendezvous."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests import generate
from manifests.names import Task, job_name
from manifests.rbac import RULES, rbac
from manifests.render import config_map, pod_monitor, pvcs, pytorchjob
from manifests.spec import JobSpec, job_from, preset_names
from trainer.spec import TrainSpec
from trainer.specbase import deep_merge, parse

TASKS: tuple[Task, ...] = ("train", "evaluate", "export")
MANIFESTS = Path(generate.__file__).parent
GENERATED = generate.files()


def job(preset: str = "tiny", **changes: Any) -> JobSpec:
    """The preset with changes; `tiny` takes steps that 16 ranks can share."""
    base = {"train": {"batch": {"tokens_per_step": 32768}}} if preset == "tiny" else {}
    return job_from({"preset": preset}, deep_merge(base, changes))


def worker(rendered: dict[str, Any]) -> dict[str, Any]:
    return rendered["spec"]["pytorchReplicaSpecs"]["Worker"]


def pod_spec(rendered: dict[str, Any]) -> dict[str, Any]:
    return worker(rendered)["template"]["spec"]


def container(rendered: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod_spec(rendered)["containers"]
    return found


every_job = pytest.mark.parametrize("preset", preset_names())
every_task = pytest.mark.parametrize("task", TASKS)


@every_job
@every_task
def test_workers_always_have_a_rendezvous_and_end_truthfully(preset: str, task: Task) -> None:
    spec = pytorchjob(job(preset), task)["spec"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"], "a master brings an init container that is not restricted"
    replicas = spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
    elastic = spec["elasticPolicy"]
    assert (elastic["minReplicas"], elastic["maxReplicas"]) == (replicas, replicas)
    assert elastic["rdzvBackend"] == "c10d"
    assert elastic["rdzvConf"], "an empty list makes the operator panic"
    assert spec["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"
    assert spec["runPolicy"]["cleanPodPolicy"] == "Running"
    assert "backoffLimit" not in spec["runPolicy"], "the operator ignores it under ExitCode"


@pytest.mark.parametrize(
    ("gpus", "nodes", "task", "ranks", "replicas"),
    [(0, 2, "train", "1", 2), (8, 2, "train", "8", 2), (8, 2, "evaluate", "1", 1), (1, 1, "export", "1", 1)],
)
def test_ranks_and_gpus_follow_the_cluster(gpus: int, nodes: int, task: Task, ranks: str, replicas: int) -> None:
    rendered = pytorchjob(job(cluster={"gpus_per_node": gpus, "nodes": nodes, "cpus_per_node": 24}), task)
    assert rendered["spec"]["nprocPerNode"] == ranks
    assert worker(rendered)["replicas"] == replicas
    limits = container(rendered)["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (ranks if gpus else None)
    threads = {entry["name"]: entry["value"] for entry in container(rendered)["env"]}["OMP_NUM_THREADS"]
    assert int(threads) * int(ranks) <= 24


def test_each_local_rank_has_its_metrics_port() -> None:
    eight = job(cluster={"gpus_per_node": 8, "nodes": 1})
    ports = {port["name"]: port["containerPort"] for port in container(pytorchjob(eight))["ports"]}
    assert ports == {f"metrics-{rank}": 9400 + rank for rank in range(8)}
    assert "ports" not in container(pytorchjob(eight, "evaluate"))
    silent = job(train={"runtime": {"metrics_port": 0}})
    assert "ports" not in container(pytorchjob(silent))
    scraped = [endpoint["port"] for endpoint in pod_monitor(eight)["spec"]["podMetricsEndpoints"]]
    assert scraped == list(ports)
    run_of_pod = {"sourceLabels": ["__meta_kubernetes_pod_label_yaongi_run"], "targetLabel": "run"}
    for endpoint in pod_monitor(eight)["spec"]["podMetricsEndpoints"]:
        assert endpoint["relabelings"] == [run_of_pod]
    selected = pod_monitor(eight)["spec"]["selector"]["matchLabels"].items()
    assert selected <= worker(pytorchjob(eight))["template"]["metadata"]["labels"].items()


@every_job
@every_task
def test_pods_are_restricted(preset: str, task: Task) -> None:
    """The fields that the restricted Pod Security Standard asks for, and a root nobody can write to."""
    rendered = pytorchjob(job(preset), task)
    spec, main = pod_spec(rendered), container(rendered)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {spec["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {1000}
    assert main["securityContext"]["allowPrivilegeEscalation"] is False
    assert main["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert main["securityContext"]["readOnlyRootFilesystem"] is True
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim"}
    assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert spec["automountServiceAccountToken"] is False
    assert worker(rendered)["template"]["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"


@every_task
def test_what_is_mounted_is_what_the_spec_says(task: Task) -> None:
    given = job(storage={"checkpoints_dir": "/data/runs", "checkpoints_pvc": "mine"})
    rendered = pytorchjob(given, task)
    sources = {volume["name"]: volume for volume in pod_spec(rendered)["volumes"]}
    mounts = {mount["mountPath"]: sources[mount["name"]] for mount in container(rendered)["volumeMounts"]}
    assert mounts["/data/runs"]["persistentVolumeClaim"]["claimName"] == "mine"
    assert mounts["/mnt/datasets"]["persistentVolumeClaim"]["claimName"] == "llm-datasets-pvc"
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert mounts["/tmp"]["emptyDir"]
    assert mounts["/etc/yaongi"]["configMap"]["name"] == config_map(given, task)["metadata"]["name"]
    # The image's entry sets the umask, so it must not be replaced.
    assert "command" not in container(rendered)
    assert container(rendered)["args"] == [
        "python", "-m", "trainer.entrypoint", task, "--spec", "/etc/yaongi/train.yaml",
    ]  # fmt: skip


def test_the_mounted_spec_is_the_runs_spec_with_the_clusters_deadline() -> None:
    given = job(cluster={"run_timeout_seconds": 1000})
    mounted = parse(TrainSpec, yaml.safe_load(config_map(given)["data"]["train.yaml"]))
    assert mounted.runtime.deadline_seconds == 1000
    assert mounted.updated({"runtime": {"deadline_seconds": None}}) == given.train_spec()
    own = job(train={"runtime": {"deadline_seconds": 7}})
    assert parse(TrainSpec, yaml.safe_load(config_map(own)["data"]["train.yaml"])) == own.train_spec()


DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@settings(max_examples=30, deadline=None)
@given(
    name=st.from_regex(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True),
    nodes=st.sampled_from([1, 2, 4, 8, 16]),
    task=st.sampled_from(TASKS),
)
def test_names_fit_wherever_kubernetes_uses_them(name: str, nodes: int, task: Task) -> None:
    given_job = job(name=name, cluster={"nodes": nodes})
    found = job_name(given_job, task)
    last_pod = f"{found}-worker-{nodes - 1}"
    assert DNS_LABEL.fullmatch(found) and DNS_LABEL.fullmatch(last_pod) and len(last_pod) <= 63
    assert given_job.run_name.rpartition("-")[2] in found, "the hash tells runs apart, also of cut names"
    assert found.endswith("" if task == "train" else f"-{task}")
    labels = pytorchjob(given_job, task)["metadata"]["labels"]
    assert all(len(value) <= 63 for value in labels.values())


def test_train_keeps_the_runs_own_name() -> None:
    longest = job(name="n" * 40)
    assert pytorchjob(longest)["metadata"]["name"] == longest.run_name


def test_digest_changes_with_what_runs_and_with_nothing_else() -> None:
    def digest(**changes: Any) -> str:
        return pytorchjob(job(**changes))["metadata"]["annotations"]["yaongi/digest"]

    owned = pytorchjob(job(), owner={"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"})
    assert owned["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}]
    assert owned["metadata"]["annotations"]["yaongi/digest"] == digest() == digest(cluster={"namespace": "elsewhere"})
    assert digest() != digest(cluster={"nodes": 1})
    assert digest() != digest(train={"evaluate": {"max_tokens": 1}})


def test_places_on_the_cluster_come_from_the_spec() -> None:
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    any_taint = {"operator": "Exists"}
    places = {"queue": "team-a", "node_selector": {"zone": "b"}, "tolerations": [taint, any_taint]}
    rendered = pytorchjob(job(cluster=places))
    assert rendered["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert pod_spec(rendered)["nodeSelector"] == {"zone": "b"}
    assert pod_spec(rendered)["tolerations"] == [taint, any_taint]
    assert "kueue.x-k8s.io/queue-name" not in pytorchjob(job())["metadata"]["labels"]


def test_limits_and_grace_come_from_the_spec() -> None:
    limits = {"queue_timeout_seconds": 10, "start_timeout_seconds": 20, "run_timeout_seconds": 30}
    rendered = pytorchjob(job(cluster={**limits, "grace_seconds": 45, "ttl_seconds_after_finished": 7}))
    assert rendered["spec"]["runPolicy"]["activeDeadlineSeconds"] == 60, "counted from creation, so with the waiting"
    assert rendered["spec"]["runPolicy"]["ttlSecondsAfterFinished"] == 7
    assert pod_spec(rendered)["terminationGracePeriodSeconds"] == 45
    assert rendered["spec"]["elasticPolicy"]["rdzvConf"] == [{"key": "join_timeout", "value": "20"}]


@pytest.mark.parametrize(("gib", "text"), [(3, "3Gi"), (0.5, "512Mi"), (1.25, "1280Mi")])
def test_memory_is_written_without_loss(gib: float, text: str) -> None:
    assert container(pytorchjob(job(cluster={"memory_gib_per_node": gib})))["resources"]["limits"]["memory"] == text


def test_a_relative_directory_cannot_be_mounted() -> None:
    with pytest.raises(ValueError, match=r"storage\.datasets_dir 'work/datasets' must be an absolute path"):
        pytorchjob(job(storage={"datasets_dir": "work/datasets"}))


def test_claims_are_shared_between_nodes() -> None:
    claims = pvcs(job())
    assert [claim["metadata"]["name"] for claim in claims] == ["llm-datasets-pvc", "llm-checkpoints-pvc"]
    assert all(claim["spec"]["accessModes"] == ["ReadWriteMany"] for claim in claims)


def test_the_launcher_may_do_its_work_and_no_more() -> None:
    allowed = {
        (group, kind, verb) for r in RULES for group in r["apiGroups"] for kind in r["resources"] for verb in r["verbs"]
    }
    assert all("*" not in permission for permission in allowed)
    kinds = {(group, kind) for group, kind, _ in allowed}
    assert ("", "secrets") not in kinds and ("", "pods/exec") not in kinds
    assert {verb for _, kind, verb in allowed if kind == "pods"} == {"get", "list", "watch"}
    account, role, binding = rbac("here")
    assert role["kind"] == "Role" and binding["roleRef"]["name"] == role["metadata"]["name"]
    assert {subject["namespace"] for subject in binding["subjects"]} == {"here"}
    assert {subject["name"] for subject in binding["subjects"]} == {"pipeline-runner", account["metadata"]["name"]}


@pytest.mark.parametrize("path", sorted(GENERATED))
def test_committed_manifests_are_the_generated_ones(path: str) -> None:
    committed = (MANIFESTS / path).read_text(encoding="utf-8")
    assert committed == GENERATED[path], "run python -m manifests.generate and commit what it wrote"


def test_no_manifest_is_kept_by_hand() -> None:
    kept = {
        str(path.relative_to(MANIFESTS)) for folder in ("base", "examples") for path in (MANIFESTS / folder).iterdir()
    }
    assert kept == set(GENERATED)


def test_example_files_read_back_as_what_was_rendered() -> None:
    """YAML's own traps (numbers, block texts, Korean) change nothing."""
    two_nodes = generate.examples()["two-by-eight-h100"]
    read = list(yaml.safe_load_all((MANIFESTS / "examples/two-by-eight-h100.yaml").read_text(encoding="utf-8")))
    assert read == [config_map(two_nodes), pytorchjob(two_nodes)]
    assert worker(read[1])["replicas"] == 2
    assert container(read[1])["resources"]["limits"]["nvidia.com/gpu"] == "8"

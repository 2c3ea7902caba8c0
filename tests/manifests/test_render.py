"""What all rendered objects must have, for every spec: valid names, restricted pods, a rendezvous."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests import generate, objects
from manifests.kinds import Object, kind_of, pod_template, workers
from manifests.monitors import pod_monitor, step_monitor
from manifests.names import Task, job_name
from manifests.network import network_policies, worker_policy
from manifests.rbac import RULES, rbac
from manifests.render import config_map, job_objects, pvcs
from manifests.spec import JobSpec, job_from, load_job, preset_names
from trainer.exitcodes import ExitCode
from trainer.fields import version_of
from trainer.spec import TrainSpec
from trainer.specbase import deep_merge, parse
from trainer.trackerspec import variables_of

TASKS: tuple[Task, ...] = ("train", "evaluate", "export")
MANIFESTS = Path(generate.__file__).parent
GENERATED = generate.files()


def job(preset: str = "tiny", **changes: Any) -> JobSpec:
    """The preset with changes; `tiny` takes steps that 16 ranks can share."""
    base = {"train": {"batch": {"tokens_per_step": 32768}}} if preset == "tiny" else {}
    return job_from({"preset": preset}, deep_merge(base, changes))


def pod_spec(rendered: list[Object]) -> Object:
    return pod_template(rendered)["spec"]


def container(rendered: list[Object]) -> Object:
    (found,) = pod_spec(rendered)["containers"]
    return found


every_job = pytest.mark.parametrize("preset", preset_names())
every_kind = pytest.mark.parametrize("kind", ["pytorchjob", "trainjob"])
every_task = pytest.mark.parametrize("task", TASKS)


@every_job
@every_task
def test_pytorchjobs_always_have_a_rendezvous_and_end_truthfully(preset: str, task: Task) -> None:
    spec = job_objects(job(preset), task)[-1]["spec"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"], "a master brings an init container that is not restricted"
    replicas = spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
    elastic = spec["elasticPolicy"]
    assert (elastic["minReplicas"], elastic["maxReplicas"]) == (replicas, replicas)
    assert elastic["rdzvBackend"] == "c10d"
    assert elastic["rdzvConf"], "an empty list makes the operator panic"
    assert spec["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"
    assert spec["runPolicy"]["cleanPodPolicy"] == "Running"
    assert "backoffLimit" not in spec["runPolicy"], "the operator ignores it under ExitCode"
    assert spec["runPolicy"]["schedulingPolicy"]["minAvailable"] == replicas, "a gang is all workers or none"


@every_job
@every_task
def test_trainjobs_fail_for_permanent_codes_and_restart_as_a_gang_for_others(preset: str, task: Task) -> None:
    *_, runtime, trainjob = job_objects(job(preset, cluster={"job": "trainjob"}), task)
    reference = trainjob["spec"]["runtimeRef"]
    assert (reference["apiGroup"], reference["kind"]) == ("trainer.kubeflow.org", runtime["kind"])
    assert reference["name"] == runtime["metadata"]["name"]
    assert trainjob["spec"]["trainer"]["numProcPerNode"], "left out, the operator starts one for each CPU"
    jobset = runtime["spec"]["template"]["spec"]
    (nodes,) = jobset["replicatedJobs"]
    assert nodes["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert nodes["name"] == "node" and [c["name"] for c in pod_spec([runtime])["containers"]] == ["node"]
    spec = nodes["template"]["spec"]
    assert (spec["backoffLimit"], spec["completionMode"]) == (0, "Indexed"), "one that fails restarts all"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = spec["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["containerName"]) == ("FailJob", "In", "node")
    ours = {int(code) for code in ExitCode} - {0}
    assert ours & set(codes["values"]) == {1, 2, 3, 65, 66, 69, 70, 71, 72, 74, 75} and max(codes["values"]) == 127
    assert jobset["failurePolicy"]["restartStrategy"] == "BlockingRecreate", "two generations would share a run"
    (rule,) = jobset["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and "PodFailurePolicy" in rule["onJobFailureReasons"]
    assert "ttlSecondsAfterFinished" not in jobset, "the operator would make the JobSet anew and train again"


@pytest.mark.parametrize(
    ("gpus", "nodes", "task", "ranks", "replicas"),
    [(0, 2, "train", "1", 2), (8, 2, "train", "8", 2), (8, 2, "evaluate", "1", 1), (1, 1, "export", "1", 1)],
)
@every_kind
def test_ranks_and_gpus_follow_the_cluster(
    kind: str, gpus: int, nodes: int, task: Task, ranks: str, replicas: int
) -> None:
    cluster = {"job": kind, "gpus_per_node": gpus, "nodes": nodes, "cpus_per_node": 24}
    rendered = job_objects(job(cluster=cluster), task)
    spec = rendered[-1]["spec"]
    assert str(spec["nprocPerNode"] if kind == "pytorchjob" else spec["trainer"]["numProcPerNode"]) == ranks
    assert workers(rendered[-1]) == replicas
    limits = container(rendered)["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (ranks if gpus else None)
    environment = {entry["name"]: entry for entry in container(rendered)["env"]}
    threads = environment["OMP_NUM_THREADS"]["value"]
    assert int(threads) * int(ranks) <= 24


@every_kind
@every_task
def test_what_a_job_needs_has_its_name_and_comes_before_it(kind: str, task: Task) -> None:
    *needs, rendered = job_objects(job(cluster={"job": kind}), task)
    assert tuple(need["kind"] for need in needs) == kind_of(rendered).needs
    assert {need["metadata"]["name"] for need in needs} == {rendered["metadata"]["name"]}


@every_kind
def test_each_local_rank_has_its_metrics_port(kind: str) -> None:
    eight = job(cluster={"job": kind, "gpus_per_node": 8, "nodes": 1})
    ports = {port["name"]: port["containerPort"] for port in container(job_objects(eight))["ports"]}
    assert ports == {f"metrics-{rank}": 9400 + rank for rank in range(8)}
    assert "ports" not in container(job_objects(eight, "evaluate"))
    silent = job(cluster={"job": kind}, train={"runtime": {"metrics_port": 0}})
    assert "ports" not in container(job_objects(silent))
    scraped = [endpoint["port"] for endpoint in pod_monitor(eight)["spec"]["podMetricsEndpoints"]]
    assert scraped == list(ports)
    run_of_pod = {"sourceLabels": ["__meta_kubernetes_pod_label_yaongi_run"], "targetLabel": "run"}
    for endpoint in pod_monitor(eight)["spec"]["podMetricsEndpoints"]:
        assert endpoint["relabelings"] == [run_of_pod]
    selected = pod_monitor(eight)["spec"]["selector"]["matchLabels"].items()
    assert selected <= pod_template(job_objects(eight))["metadata"]["labels"].items()


@every_kind
def test_an_evaluation_with_benchmarks_may_fetch_them(kind: str) -> None:
    judge = {"url": "https://judge.example/v1", "model": "m", "questions": "/q.jsonl", "api_key_env": "JUDGE"}
    asked = {"suites": ["ko"], "judge": judge}
    spec = job(cluster={"job": kind, "target": "kubernetes"}, train={"evaluate": asked})
    pod = pod_template(job_objects(spec, "evaluate"))
    (box,) = pod["spec"]["containers"]
    env = {each["name"]: each.get("value", each.get("valueFrom")) for each in box["env"]}
    assert pod["metadata"]["labels"]["yaongi/egress"] == "hub"
    assert env["HF_HOME"].startswith(spec.storage.checkpoints_dir), "the volume that a worker may write to"
    assert env["JUDGE"] == {"secretKeyRef": {"name": "judge", "key": "token", "optional": True}}
    assert [port["name"] for port in box["ports"]] == ["metrics-0"]
    for other in (job_objects(spec, "train"), job_objects(job(cluster={"job": kind}), "evaluate")):
        template = pod_template(other)
        names = {each["name"] for each in template["spec"]["containers"][0]["env"]}
        assert "yaongi/egress" not in template["metadata"]["labels"] and not names & {"JUDGE", "HF_HOME", "HF_TOKEN"}


def test_steps_are_scraped_at_an_address_made_of_their_pods() -> None:
    """Kubeflow Pipelines declares no container port, among which `port` and `portNumber` select."""
    spec = step_monitor(job())["spec"]
    assert spec["selector"]["matchLabels"] == {"app.kubernetes.io/name": "yaongi-step"}
    (endpoint,) = spec["podMetricsEndpoints"]
    assert not {"port", "portNumber", "targetPort"} & set(endpoint)
    container, address, run = endpoint["relabelings"]
    assert (container["action"], container["regex"]) == ("keep", "main")
    assert (address["targetLabel"], address["replacement"]) == ("__address__", "${1}:9390")
    assert run == {"sourceLabels": ["__meta_kubernetes_pod_label_pipeline_runid"], "targetLabel": "run"}


@every_job
@every_task
@every_kind
def test_pods_are_restricted(kind: str, preset: str, task: Task) -> None:
    """The fields that the restricted Pod Security Standard requires, and a read-only root."""
    rendered = job_objects(job(preset, cluster={"job": kind}), task)
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
    assert pod_template(rendered)["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"


@every_task
@every_kind
def test_what_is_mounted_is_what_the_spec_says(kind: str, task: Task) -> None:
    given = job(cluster={"job": kind}, storage={"checkpoints_dir": "/data/runs", "checkpoints_pvc": "mine"})
    rendered = job_objects(given, task)
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


def test_the_mounted_spec_holds_the_workers_to_what_the_cluster_promised() -> None:
    def mounted(given: JobSpec) -> TrainSpec:
        return parse(TrainSpec, yaml.safe_load(config_map(given)["data"]["train.yaml"]))

    given = job(cluster={"run_timeout_seconds": 1000, "shared_memory_gib": 1.5})
    found = mounted(given)
    assert found.runtime.deadline_seconds == 1000
    assert found.runtime.preflight.min_shared_memory_gib == 1.5
    assert found.model_copy(update={"runtime": given.train_spec().runtime}) == given.train_spec()
    assert found.runtime.device == "auto"
    assert mounted(job(cluster={"gpus_per_node": 1})).runtime.device == "cuda", "a lost GPU must not train on the CPU"
    own = job(train={"runtime": {"deadline_seconds": 7, "preflight": {"min_shared_memory_gib": 0.25}}})
    assert mounted(own) == own.train_spec()


def test_a_worker_knows_its_nodes_name() -> None:
    (entry,) = (entry for entry in container(job_objects(job()))["env"] if entry["name"] == "NODE_NAME")
    assert entry["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"


DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@settings(max_examples=30, deadline=None)
@given(
    name=st.from_regex(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True),
    nodes=st.sampled_from([1, 2, 4, 8, 16]),
    task=st.sampled_from(TASKS),
    kind=st.sampled_from(["pytorchjob", "trainjob"]),
)
def test_names_fit_wherever_kubernetes_uses_them(name: str, nodes: int, task: Task, kind: str) -> None:
    given_job = job(name=name, cluster={"nodes": nodes, "job": kind})
    found = job_name(given_job, task)
    last_pod = f"{found}-worker-{nodes - 1}" if kind == "pytorchjob" else f"{found}-node-0-{nodes - 1}-abcde"
    assert DNS_LABEL.fullmatch(found) and DNS_LABEL.fullmatch(last_pod) and len(last_pod) <= 63
    assert given_job.run_name.rpartition("-")[2] in found, "the hash tells runs apart, also of cut names"
    assert found.endswith("" if task == "train" else f"-{task}")
    for item in job_objects(given_job, task):
        assert item["metadata"]["name"] == found
        assert all(len(value) <= 63 for value in item["metadata"]["labels"].values())


@pytest.mark.parametrize(("kind", "characters"), [("pytorchjob", 40), ("trainjob", 38)])
def test_train_keeps_the_runs_own_name(kind: str, characters: int) -> None:
    longest = job(name="n" * characters, cluster={"job": kind, "nodes": 4})
    assert job_name(longest) == longest.run_name


@every_kind
def test_digest_changes_with_what_runs_and_with_nothing_else(kind: str) -> None:
    def digest(cluster: dict[str, Any] | None = None, **changes: Any) -> str:
        rendered = job_objects(job(cluster={"job": kind, **(cluster or {})}, **changes))
        return rendered[-1]["metadata"]["annotations"]["yaongi/digest"]

    assert digest() == digest(cluster={"namespace": "elsewhere"})
    assert digest() != digest(cluster={"nodes": 1})
    assert digest() != digest(cluster={"cpus_per_node": 3})
    assert digest() != digest(train={"evaluate": {"max_tokens": 1}})


@every_kind
def test_places_on_the_cluster_come_from_the_spec(kind: str) -> None:
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    any_taint = {"operator": "Exists"}
    places = {"queue": "team-a", "node_selector": {"zone": "b"}, "tolerations": [taint, any_taint]}
    rendered = job_objects(job(cluster={"job": kind, "priority_class": "high", **places}))
    labelled = [item["kind"] for item in rendered if "kueue.x-k8s.io/queue-name" in item["metadata"]["labels"]]
    assert labelled == [rendered[-1]["kind"]], "Kueue suspends what carries its label"
    assert rendered[-1]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert pod_spec(rendered)["priorityClassName"] == "high"
    assert pod_spec(rendered)["nodeSelector"] == {"zone": "b"}
    assert pod_spec(rendered)["tolerations"] == [taint, any_taint]
    plain = job_objects(job(cluster={"job": kind}))
    assert "kueue.x-k8s.io/queue-name" not in plain[-1]["metadata"]["labels"]
    assert not {"priorityClassName", "nodeSelector", "tolerations"} & set(pod_spec(plain))


def test_limits_and_grace_come_from_the_spec() -> None:
    limits = {"queue_timeout_seconds": 10, "start_timeout_seconds": 20, "run_timeout_seconds": 30}
    limits |= {"grace_seconds": 45, "ttl_seconds_after_finished": 7}
    rendered = job_objects(job(cluster=limits))
    spec = rendered[-1]["spec"]
    assert spec["runPolicy"]["activeDeadlineSeconds"] == 60, "counted from creation, so with the waiting"
    assert spec["runPolicy"]["ttlSecondsAfterFinished"] == 7
    assert pod_spec(rendered)["terminationGracePeriodSeconds"] == 45
    assert spec["elasticPolicy"]["rdzvConf"] == [{"key": "join_timeout", "value": "20"}]

    rendered = job_objects(job(cluster={**limits, "job": "trainjob"}))
    (nodes,) = rendered[-2]["spec"]["template"]["spec"]["replicatedJobs"]
    assert nodes["template"]["spec"]["activeDeadlineSeconds"] == 60
    assert pod_spec(rendered)["terminationGracePeriodSeconds"] == 45
    assert {"name": "PET_RDZV_CONF", "value": "timeout=20"} in container(rendered)["env"]


@pytest.mark.parametrize(("gib", "text"), [(3, "3Gi"), (0.5, "512Mi"), (1.25, "1280Mi")])
def test_memory_is_written_without_loss(gib: float, text: str) -> None:
    assert container(job_objects(job(cluster={"memory_gib_per_node": gib})))["resources"]["limits"]["memory"] == text


def test_a_relative_directory_cannot_be_mounted() -> None:
    with pytest.raises(ValueError, match=r"storage\.datasets_dir 'work/datasets' must be an absolute path"):
        job_objects(job(storage={"datasets_dir": "work/datasets"}))


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
        str(path.relative_to(MANIFESTS))
        for folder in ("base", "examples")
        for path in (MANIFESTS / folder).glob("*.yaml")
    }
    assert kept == set(GENERATED)


def test_langfuse_is_told_by_trainings_of_megatron_alone() -> None:
    job = generate.examples()["two-by-eight-h100-megatron"]

    def variables(task: Task) -> dict[str, dict]:
        return {entry["name"]: entry.get("valueFrom", {}) for entry in objects.container(job, task)["env"]}

    found = variables("train")["LANGFUSE_SECRET_KEY"]["secretKeyRef"]
    assert found == {"name": "langfuse-secrets", "key": "LANGFUSE_SECRET_KEY", "optional": True}
    assert not any(name.startswith("LANGFUSE") for name in variables("evaluate"))
    own = objects.container(job.updated({"train": {"engine": "yaongi", "megatron": None}}), "train")
    assert not any(entry["name"].startswith("LANGFUSE") for entry in own["env"])


TRACKERS = {
    "wandb": {"project": "p"},
    "mlflow": {"tracking_uri": "http://mlflow.mlops:5000"},
    "langfuse": {"host": "https://langfuse.example"},
}


def test_keys_of_trackers_come_from_secrets_and_only_where_the_job_names_them() -> None:
    plain = load_job("tiny")
    job = load_job("tiny", {"train": {"trackers": TRACKERS}, "cluster": {"wandb_secret": "our-wandb"}})
    assert job.run_name == plain.run_name and version_of(plain) == 1 < version_of(job) == 9

    def keys(of: JobSpec, task: Task) -> dict[str, tuple[str, str]]:
        found = (entry for entry in objects.container(of, task)["env"] if "secretKeyRef" in entry.get("valueFrom", {}))
        references = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in found}
        assert all(each["optional"] for each in references.values())
        return {name: (each["name"], each["key"]) for name, each in references.items()}

    assert keys(job, "train") == keys(job, "evaluate") and keys(job, "export") == keys(plain, "train") == {}
    assert keys(job, "train") == {
        "WANDB_API_KEY": ("our-wandb", "WANDB_API_KEY"),
        **{name: ("langfuse-secrets", name) for name in variables_of("langfuse")},
        **{name: ("mlflow", name) for name in variables_of("mlflow")},
    }


def test_pods_reach_trackers_only_if_the_job_names_them() -> None:
    def may(trackers: dict | None) -> tuple[bool, dict]:
        job = load_job("tiny", {"train": {"trackers": trackers}})
        labels = objects.pod_template(job, "train")["metadata"]["labels"]
        return labels.get("yaongi/egress") == "hub", worker_policy(job, "train")

    plain, policy = may(None)
    assert not plain and policy["policyTypes"] == ["Ingress"] and "egress" not in policy
    web, policy = may({"langfuse": TRACKERS["langfuse"], "wandb": TRACKERS["wandb"]})
    assert web and policy["policyTypes"] == ["Ingress"], "the policy for the web suffices"
    web, policy = may(TRACKERS)
    assert web and policy["policyTypes"] == ["Ingress", "Egress"]
    everywhere = [rule for rule in policy["egress"] if "to" not in rule]
    assert everywhere == [{"ports": [{"port": port, "protocol": "TCP"} for port in (80, 443, 5000)]}]
    of_all = next(each for each in network_policies() if each["metadata"]["name"] == "yaongi-trainer")
    assert policy["egress"][:-1] == of_all["spec"]["egress"], "else, what all workers may reach"


def test_example_files_read_back_as_what_was_rendered() -> None:
    """YAML's own traps (numbers, block texts, Korean) change nothing."""
    two_nodes = generate.examples()["two-by-eight-h100"]
    read = list(yaml.safe_load_all((MANIFESTS / "examples/two-by-eight-h100.yaml").read_text(encoding="utf-8")))
    assert read == job_objects(two_nodes)
    assert workers(read[-1]) == 2
    assert container(read)["resources"]["limits"]["nvidia.com/gpu"] == "8"

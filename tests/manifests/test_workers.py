"""What a job may give its workers' pods: variables, labels, devices, the network between nodes, their spread."""

from __future__ import annotations

from typing import Any

import pytest

from manifests import fabric
from manifests.fabric import PROFILES
from manifests.kinds import Object, pod_template
from manifests.lint.check import lint
from manifests.names import Task
from manifests.render import job_objects, worker_spec
from manifests.spec import JobSpec, job_from
from manifests.yamltext import to_manifest
from trainer.errors import SpecError
from trainer.fields import version_of
from trainer.trackerspec import variables_of

every_kind = pytest.mark.parametrize("kind", ["pytorchjob", "trainjob"])
EIGHT = {"nodes": 2, "gpus_per_node": 8, "cpus_per_node": 96, "memory_gib_per_node": 960}
FULL = {
    "env": {"NCCL_DEBUG": "WARN", "EMPTY": ""},
    "labels": {"team": "research", "example.com/cost-centre": "7"},
    "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma-a, rdma-b"},
    "resources": {"rdma/hca_shared": 1, "hugepages-2Mi": "1Gi"},
    "devices": {"nic.example.com": 8, "gpu.example.com": 1},
    "ulimits": {"memlock": -1, "nofile": 65536},
    "spread": {"topology_key": "example.com/rack", "max_skew": 2, "required": True},
}


def job(**cluster: Any) -> JobSpec:
    return job_from({"preset": "h100-4b"}, {"cluster": EIGHT | cluster})


def parts(made: JobSpec, task: Task = "train") -> tuple[Object, Object]:
    """The workers' pod template and their container."""
    template = pod_template(job_objects(made, task))
    return template, template["spec"]["containers"][0]


def refusal(**cluster: Any) -> str:
    with pytest.raises(SpecError) as refused:
        job(**cluster)
    return str(refused.value)


@every_kind
def test_training_pods_get_it_and_others_do_not(kind: str) -> None:
    made = job(job=kind, **FULL)
    template, worker = parts(made)
    metadata, spec = template["metadata"], template["spec"]
    assert FULL["labels"].items() <= metadata["labels"].items()
    assert FULL["annotations"].items() <= metadata["annotations"].items()
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in worker["env"] and {"name": "EMPTY", "value": ""} in worker["env"]
    wanted = {"rdma/hca_shared": "1", "hugepages-2Mi": "1Gi"}
    for side in ("requests", "limits"):
        assert wanted.items() <= worker["resources"][side].items(), "Kubernetes wants both to be equal"
    (spread,) = spec["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["maxSkew"], spread["whenUnsatisfiable"]) == (
        "example.com/rack",
        2,
        "DoNotSchedule",
    )
    assert spread["labelSelector"]["matchLabels"].items() <= metadata["labels"].items()
    name = "pytorch" if kind == "pytorchjob" else "node"
    ulimits = metadata["annotations"][f"ulimits.nri.containerd.io/container.{name}"]
    unlimited = '{"type": "memlock", "hard": 18446744073709551615, "soft": 18446744073709551615}'
    assert ulimits == f'[{unlimited}, {{"type": "nofile", "hard": 65536, "soft": 65536}}]'
    assert parts(made, "evaluate") == parts(job(job=kind), "evaluate")


@every_kind
def test_devices_of_a_class_come_by_a_claim_template(kind: str) -> None:
    *needs, rendered = job_objects(job(job=kind, **FULL))
    template = next(need for need in needs if need["kind"] == "ResourceClaimTemplate")
    assert template["metadata"]["name"] == rendered["metadata"]["name"]
    pod, worker = parts(job(job=kind, **FULL))
    (claim,) = pod["spec"]["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == template["metadata"]["name"]
    assert worker["resources"]["claims"] == [{"name": claim["name"]}]
    asked = [request["exactly"] for request in template["spec"]["spec"]["devices"]["requests"]]
    assert [(one["deviceClassName"], one["count"]) for one in asked] == [("nic.example.com", 8), ("gpu.example.com", 1)]
    assert all(need["kind"] != "ResourceClaimTemplate" for need in job_objects(job(**FULL), "evaluate"))


def test_nothing_asked_changes_nothing() -> None:
    template, worker = parts(job())
    assert not {"resourceClaims", "topologySpreadConstraints", "initContainers"} & set(template["spec"])
    assert "claims" not in worker["resources"] and version_of(job()) < 7 <= version_of(job(**FULL))
    assert job(**FULL).run_name == job().run_name


@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_every_variable_of_a_pod_is_refused_in_env(task: Task) -> None:
    benchmarks = {"evaluate": {"suites": ["ko"]}}
    _, worker = parts(
        job_from({"preset": "h100-4b"}, {"cluster": EIGHT | {"job": "trainjob"}, "train": benchmarks}), task
    )
    names = [entry["name"] for entry in worker["env"]]
    assert "HOME" in names
    for name in (
        *names,
        *variables_of("langfuse"),
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "PET_NNODES",
        "TORCHELASTIC_RUN_ID",
    ):
        assert f"{name} is set by yaongi" in refusal(env={name: "1"}), name


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ({"env": {"WANDB_API_KEY": "0123456789abcdef"}}, "cluster.env: WANDB_API_KEY looks like a secret"),
        ({"env": {"NOTE": "hf_" + "a" * 30}}, "NOTE looks like a secret"),
        ({"env": {"1ST": "x"}}, "'1ST' cannot name a variable"),
        ({"labels": {"yaongi/run": "x"}}, "cluster.labels: yaongi/run is set by yaongi"),
        ({"labels": {"kueue.x-k8s.io/queue-name": "x"}}, "cluster.queue names a queue"),
        ({"labels": {"team": "a b"}}, "cannot be a label's value"),
        ({"annotations": {"sidecar.istio.io/inject": "true"}}, "is set by yaongi"),
        ({"annotations": {"a b": "x"}}, "'a b' cannot be a key"),
        ({"resources": {"nvidia.com/gpu": 8}}, "nvidia.com/gpu is cluster.gpus_per_node"),
        ({"resources": {"rdma": 1}}, "'rdma' is no device's resource"),
        ({"resources": {"rdma/hca": "0.5"}}, "'0.5' is no number of devices"),
        ({"resources": {"hugepages-1Gi": "512Mi"}}, "no multiple of its page size"),
        ({"resources": {"hugepages-2Mi": 512}}, "no multiple of its page size"),
        ({"resources": {"hugepages-0Mi": "1Gi"}}, "'hugepages-0Mi' is no device's resource"),
        ({"resources": {"requests.example.com/nic": 1}}, "is no device's resource"),
        ({"resources": {"rdma/hca": 1.5}}, "rdma/hca: '1.5' is no number of devices"),
        ({"resources": {"rdma/hca": None}}, "'None' is no number of devices"),
        ({"resources": {"rdma/hca": "٣"}}, "'٣' is no number of devices"),
        ({"devices": {"nic.example.com": 0}}, "cluster.devices.nic.example.com"),
        ({"devices": {"a..b": 1}}, "'a..b' cannot name a device class"),
        ({"devices": {"nic.example.com": 32, "gpu.example.com": 1}}, "33 devices; a pod's claim can hold 32"),
        ({"ulimits": {"memlok": 1}}, "cluster.ulimits.memlok"),
        ({"ulimits": {"nofile": -1}}, "nofile: the kernel refuses -1"),
        ({"ulimits": {"memlock": 2**64}}, "cluster.ulimits.memlock: must be less"),
        ({"spread": {"max_skew": 0}}, "cluster.spread.max_skew"),
        ({"spread": {"topology_key": "a rack"}}, "'a rack' cannot be a node's label"),
        ({"queue": "team", "topology": {"required": ""}}, "cluster.topology.required: '' cannot be a node's label"),
        ({"queue": "My Team"}, "cluster.queue: 'My Team' cannot be a name here; write small letters"),
        ({"queue": "team", "queue_priority": "a" * 64}, "at most 63 characters"),
        ({"hub_secret": "HF_TOKEN"}, "cluster.hub_secret: 'HF_TOKEN' cannot be a name here"),
        ({"env": {"NCCL_IB_TC": 106}}, "(got 106); put it in quotes: '106' in a file, \"'106'\" after --set"),
        ({"env": {"DEBUG": True}}, "put it in quotes: 'true'"),
        ({"annotations": {"k8s": {"v1": "x"}}}, "write a name with dots in braces: 'cluster.annotations={NAME: TEXT}'"),
        ({"fabric": "infinband"}, "cluster.fabric"),
        ({"fabric": "roce"}, "needs the devices of its cards; add cluster.resources"),
        ({"fabric": "roce", "resources": {"hugepages-2Mi": "1Gi"}}, "needs the devices of its cards"),
        ({"fabric": "efa"}, "{vpc.amazonaws.com/efa: 32}"),
        ({"fabric": "efa", "gpus_per_node": 0}, "gpus_per_node is 0"),
        ({"fabric": "tcpxo", "gpus_per_node": 4}, "machines with 8 GPUs"),
        ({"fabric": "tcpx"}, "needs the annotation networking.gke.io/interfaces"),
    ],
)
def test_what_cannot_be_is_one_line_with_the_remedy(cluster: dict, said: str) -> None:
    text = refusal(**cluster)
    assert said in text and "\n" not in text, text


def asked(name: str) -> dict[str, Any]:
    """What a job with this fabric must name besides it."""
    return {"resources": {"rdma/hca": 8}, "annotations": {fabric.INTERFACES: "[]"}, "fabric": name}


@every_kind
@pytest.mark.parametrize("name", PROFILES)
def test_a_fabric_is_rendered_and_must_be_taken(name: str, kind: str) -> None:
    made = job(job=kind, **asked(name))
    template, worker = parts(made)
    variables = {entry["name"]: entry.get("value") for entry in worker["env"]}
    assert fabric.environment(name).items() <= variables.items()
    assert worker_spec(made).runtime.preflight.fabric == name
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    containers = [worker, *template["spec"].get("initContainers", [])]
    assert all(mount["name"] in volumes for one in containers for mount in one["volumeMounts"])
    wins = job(job=kind, **asked(name), env={"NCCL_SOCKET_IFNAME": "net1"})
    assert {"name": "NCCL_SOCKET_IFNAME", "value": "net1"} in parts(wins)[1]["env"]
    one = job(job=kind, **asked(name), nodes=1)
    assert worker_spec(one).runtime.preflight.fabric is None and "initContainers" not in parts(one)[0]["spec"]


def test_a_fabric_cannot_go_unchecked() -> None:
    """Told of the job, before its data are made, not only when its objects are."""
    unchecked = {"train": {"runtime": {"preflight": {"enabled": False}}}}
    with pytest.raises(SpecError, match=r"cluster\.fabric needs .* only preflight sees whether NCCL takes it"):
        job_from({"preset": "h100-4b"}, {"cluster": EIGHT | asked("roce")} | unchecked)


@every_kind
@pytest.mark.parametrize("name", [None, *PROFILES])
def test_lint_finds_in_it_only_the_rights_that_a_daemon_needs(name: str | None, kind: str) -> None:
    made = job(job=kind, **FULL) if name is None else job(job=kind, **asked(name))
    found = {finding.rule for finding in lint({"job.yaml": to_manifest(job_objects(made))}).findings}
    daemon = bool(name and PROFILES[name].daemon)
    assert found == ({"volume-type", "capabilities", "run-as-non-root", "writable-root"} if daemon else set()), found


def test_secrets_are_named_by_the_job() -> None:
    judge = {"url": "https://judge.example/v1", "model": "m", "questions": "/q.jsonl", "api_key_env": "JUDGE_KEY"}
    evaluate = {"evaluate": {"suites": ["ko"], "judge": judge}}
    for named, secrets in (
        ({}, ("huggingface", "judge")),
        ({"hub_secret": "hf-token", "judge_secret": "j"}, ("hf-token", "j")),
    ):
        made = job_from({"preset": "h100-4b"}, {"cluster": named, "train": evaluate})
        _, worker = parts(made, "evaluate")
        found = {
            e["name"]: e["valueFrom"]["secretKeyRef"]["name"]
            for e in worker["env"]
            if "secretKeyRef" in e.get("valueFrom", {})
        }
        assert found == dict(zip(("HF_TOKEN", "JUDGE_KEY"), secrets, strict=True))


def test_the_page_is_what_the_profiles_say() -> None:
    assert fabric.PAGE.read_text(encoding="utf-8") == fabric.page()

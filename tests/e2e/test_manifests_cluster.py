"""The shipped manifests, unchanged, with a real API server: schemas, admission webhooks, Pod Security."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import OPERATED, base_objects
from kube import Namespace, Object, wait_for

from manifests import generate
from manifests.kinds import pod_template

pytestmark = pytest.mark.e2e

EXAMPLES = sorted((Path(generate.__file__).parent / "examples").glob("*.yaml"))
by_file = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


DRY_RUN = ("apply", "--dry-run=server", "--validate=strict", "-f", "-")


def dry_run(namespace: Namespace, item: Object, *, check: bool = True) -> str:
    return namespace.kubectl(*DRY_RUN, stdin=json.dumps(item), check=check)


def objects(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@by_file
def test_examples_pass_the_servers_own_validation(namespace: Namespace, path: Path) -> None:
    *needs, job = objects(path)
    runtimes = [item for item in needs if item["kind"] == "TrainingRuntime"]
    try:
        for runtime in runtimes:  # a TrainJob is refused without it, also in a dry run
            namespace.apply(runtime)
        for item in needs:
            assert "(server dry run)" in dry_run(namespace, item)
        # The webhook looks up the runtime in a cache that may be outdated.
        admitted = f"/{job['metadata']['name']} created (server dry run)"
        wait_for("the job to be admitted", lambda: admitted in dry_run(namespace, job, check=False), 60)
    finally:
        for runtime in runtimes:
            namespace.kubectl("delete", "trainingruntime", runtime["metadata"]["name"])


@by_file
def test_restricted_pod_security_admits_the_examples_pods(namespace: Namespace, path: Path) -> None:
    template = pod_template(objects(path))
    # Priority classes and Kueue's gates would be looked up; neither is what this asks about.
    pod: Object = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": path.stem}, "spec": template["spec"]}
    assert f"pod/{path.stem} created (server dry run)" in dry_run(namespace, pod)


def test_what_a_namespace_needs_passes_the_servers_own_validation(namespace: Namespace) -> None:
    found = base_objects(namespace.name)
    assert {item["kind"] for item in found} >= {"NetworkPolicy", "Role", "PersistentVolumeClaim"}
    for item in found:
        assert "(server dry run)" in dry_run(namespace, item)


def test_of_what_is_shipped_only_the_prometheus_operators_objects_were_left_out(namespace: Namespace) -> None:
    shipped = [item for path in Path(generate.__file__).parent.glob("base/*.yaml") for item in objects(path)]
    left_out = [item for item in shipped if item["kind"] in OPERATED]
    assert {item["apiVersion"] for item in left_out} == {"monitoring.coreos.com/v1"}
    assert len(shipped) == len(left_out) + len(base_objects(namespace.name))


def test_a_field_that_kubernetes_does_not_know_would_be_noticed(namespace: Namespace) -> None:
    policy = next(item for item in base_objects(namespace.name) if item["kind"] == "NetworkPolicy")
    policy["spec"]["policyTypse"] = ["Ingress"]
    command = ["kubectl", "--namespace", namespace.name, *DRY_RUN]
    done = subprocess.run(command, input=json.dumps(policy), capture_output=True, text=True, timeout=300)
    assert done.returncode and 'unknown field "spec.policyTypse"' in done.stderr

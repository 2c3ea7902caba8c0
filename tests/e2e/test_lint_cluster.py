"""The linter's findings for manifests against the response of a real API server (dry run on the server)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from kube import Namespace, Object, wait_for
from kubernetes.client.exceptions import ApiException
from launching import BUSYBOX
from lint_cases import CASES
from lint_job_cases import TARGETS
from lint_manifests import Case, changed, good, patches

from components.cluster.api import RESOURCES, Cluster, status_message
from manifests.kinds import PYTORCHJOB
from manifests.lint.check import lint
from manifests.lint.fields import KUBERNETES, OPERATORS, of_kind
from manifests.lint.schemas import Operators

pytestmark = pytest.mark.e2e

# Rules whose reason says that the API server or a webhook denies the object, and that object.
DENIED = {
    "replica-types": 0,
    "master-replicas": 0,
    "container-name": 0,
    "image-missing": 0,
    "elastic-without-worker": 0,
    "nproc-deprecated": 0,
    "managed-by": 0,
    "trainjob-runtime-ref": 3,
    "trainjob-runtime-scope": 3,
    "trainjob-reserved-env": 3,
    "trainjob-override-env": 3,
    "trainjob-patch-manager": 3,
    "trainjob-managed-by": 3,
    "runtime-container-name": 2,
    "runtime-replicas": 2,
    "unknown-field": 0,
    "missing-field": 0,
    "not-a-string": 0,
    "not-a-number": 0,
    "wrong-type": 0,
    "not-a-quantity": 0,
    "written-twice": 0,
}
# Errors that the cluster accepts silently, for which the linter is needed.
ACCEPTED = {
    "no-rendezvous": 0,
    "elastic-with-master": 0,
    "elastic-bounds": 0,
    "rdzv-conf-empty": 0,
    "rdzv-backend": 0,
    "nproc-not-gpus": 0,
    "restart-policy-unknown": 0,
    "restart-always": 0,
    "clean-pod-policy": 0,
    "clean-pod-policy-unknown": 0,
    "trainjob-name": 3,
    "trainjob-num-nodes": 3,
    "trainjob-num-proc": 3,
    "trainjob-unknown-override": 3,
    "trainjob-unknown-container": 3,
    "runtime-no-trainer": 2,
    "runtime-ttl": 2,
    "gpu-limit": 0,
    "request-above-limit": 0,
    "gang-min-available": 0,
    "port-name": 0,
    "port-taken": 0,
    "mount-unknown": 0,
    "reserved-env": 0,
    "host-namespace": 0,
    "privileged": 0,
    "nproc-option": 0,
    "standalone-option": 0,
    "node-rank-option": 0,
    "endpoint-local": 0,
    "endpoint-of-nobody": 0,
    "launcher-option": 0,
    "no-launcher": 0,
    "memory-unit": 0,
    "one-of": 0,
    "out-of-range": 0,
    "unknown-word": 0,
}
# What Trainer 2.1 answers otherwise.
DENIED_BY_2_1 = {"trainjob-unknown-override": 3, "runtime-elastic": 2}


def dry_run(space: Namespace, body: Object) -> str | None:
    """Why the server would refuse to create the object; None if it would not."""
    group, version, plural = RESOURCES[body["kind"]]
    api = Cluster.connect(space.name).custom
    metadata = {**body["metadata"], "namespace": space.name}
    if body["kind"] == "TrainingRuntime":  # an object of that name exists
        metadata["name"] = "another"
    body = {**body, "metadata": metadata}
    said = None
    for pause in (1, 2, 4, 8):
        try:
            api.create_namespaced_custom_object(
                group, version, space.name, plural, body, dry_run="All", field_validation="Strict"
            )
            return None
        except ApiException as error:
            said = status_message(error)
        if "failed calling webhook" not in said:
            break
        time.sleep(pause)  # the operator is busy
    return said


def cases(rules: dict[str, int], release: str) -> Iterator[tuple[str, Case]]:
    """Those of a release; cases without TrainJobs are the same for all."""
    of_old = {rule for rule, of, _ in CASES if of == "2.1"}
    for rule, of, case in CASES:
        if rule in rules and (of == release or (release == "2.1" and rule not in of_old)):
            yield rule, case


def concerned(case: tuple[tuple[str, object], ...], of_rule: int) -> int:
    """The object that a case is about."""
    path = case[0][0]
    return 3 if path.startswith(("TRAINER/", "trainjob/")) else 2 if path.startswith("runtime/") else of_rule


@pytest.fixture(scope="module")
def with_runtime(namespace: Namespace) -> Namespace:
    namespace.apply(good()["runtime"])
    # The webhook looks up the runtime in a cache that may be outdated.
    wait_for("the runtime to be known", lambda: dry_run(namespace, good()["trainjob"]) is None, 180)
    return namespace


def test_what_the_linter_finds_clean_is_accepted(with_runtime):
    for name in ("job", "runtime", "trainjob"):
        assert dry_run(with_runtime, good()[name]) is None


def test_what_the_linter_says_is_denied_is_denied(with_runtime):
    release = with_runtime.trainer()
    rules = DENIED | (DENIED_BY_2_1 if release == "2.1" else {})
    if any("kueue" in each["metadata"]["name"] for each in with_runtime.find("mutatingwebhookconfigurations")):
        # It reads and writes jobs as Go does, so that what is missing is empty before the server looks for it.
        rules = {rule: index for rule, index in rules.items() if rule not in ("missing-field", "wrong-type")}
    accepted = []
    for rule, case in cases(rules, release):
        denied = dry_run(with_runtime, changed(*case)[concerned(case, rules[rule])])
        print(f"{rule}: {denied}")
        accepted += [(rule, case)] * (not denied)
    assert accepted == []


def test_what_the_linter_finds_wrong_beyond_is_accepted_in_silence(with_runtime):
    release = with_runtime.trainer()
    rules = {rule: index for rule, index in ACCEPTED.items() if release != "2.1" or rule not in DENIED_BY_2_1}
    told = []
    for rule, case in cases(rules, release):
        denied = dry_run(with_runtime, changed(*case)[concerned(case, rules[rule])])
        told += [(rule, case, denied)] * (denied is not None)
    assert told == [], "the server says so itself"


def test_what_the_server_takes_is_no_error_of_structure(with_runtime):
    """Changes of a TrainJob that are right: the linter and the server agree."""
    if with_runtime.trainer() == "2.1":
        right = [("podTemplateOverrides", [{"targetJobs": TARGETS, "spec": {"nodeSelector": {"pool": "a"}}}])]
    else:
        pod = {"nodeSelector": {"pool": "a"}, "terminationGracePeriodSeconds": 30, "containers": [{"name": "node"}]}
        right = [("runtimePatches", patches(pod)), ("activeDeadlineSeconds", 60)]
    for field, value in right:
        objects = changed((f"trainjob/spec/{field}", value))
        assert (
            lint(
                {"x": json.dumps({"kind": "List", "apiVersion": "v1", "items": objects})}, with_runtime.trainer()
            ).errors
            == 0
        )
        assert dry_run(with_runtime, objects[3]) is None


def test_the_known_fields_are_those_of_the_cluster(namespace):
    tables = (json.loads(path.read_text(encoding="utf-8"))["types"] for path in (KUBERNETES, OPERATORS))
    operators, checked = Operators(*tables), []
    for definition in (crd["spec"] for crd in namespace.find("crds")):
        kind = definition["names"]["kind"]
        for version in definition["versions"]:
            known = of_kind(f"{definition['group']}/{version['name']}", kind, namespace.trainer())
            if known:
                assert operators.root(version["schema"]["openAPIV3Schema"], kind) == known
                checked.append(kind)
    assert {PYTORCHJOB.kind, "TrainJob", "TrainingRuntime"} <= set(checked)


def test_a_failed_job_of_a_runtime_with_a_ttl_trains_again(namespace):
    """The most expensive trap of the list, observed: the second JobSet of one TrainJob that failed."""
    objects = good()
    runtime, job = objects["runtime"], objects["trainjob"]
    runtime["metadata"]["name"] = job["metadata"]["name"] = job["spec"]["runtimeRef"]["name"] = "again"
    runtime["spec"]["template"]["spec"]["ttlSecondsAfterFinished"] = 1
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    pod["volumes"].pop(0)
    container = pod["containers"][0]
    container.update(command=["false"], env=[], resources={}, volumeMounts=[])  # there is no secret, claim or GPU
    job["spec"]["trainer"] = {"image": BUSYBOX, "numNodes": 1, "numProcPerNode": 1}
    assert "runtime-ttl" in {finding.rule for finding in lint({"x": json.dumps(runtime)}).findings}
    namespace.apply(runtime)
    namespace.apply_when_admitted(job)
    try:
        first = wait_for("the first JobSet", lambda: _jobset_uid(namespace), 120)
        second = wait_for("another", lambda: _jobset_uid(namespace), 300, is_there=lambda uid: uid not in ("", first))
        print(f"one TrainJob, JobSets {first} and {second}")
    finally:
        namespace.kubectl("delete", "trainjob", "again", "--wait=false")


def _jobset_uid(space: Namespace) -> str:
    return space.kubectl("get", "jobset", "again", "-o", "jsonpath={.metadata.uid}", check=False)

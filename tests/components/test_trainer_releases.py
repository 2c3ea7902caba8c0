"""TrainJobs with the releases of Kubeflow Trainer: what 2.1 and 2.3 answered, and what the launcher makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from components.cluster import state
from components.cluster.api import Cluster, Refused, UnknownFields
from components.diagnose import explain
from components.diagnose.why import Situation, why
from components.launch import kubernetes
from manifests.render import job_objects
from manifests.spec import job_from
from manifests.trainjob import bounded, for_release
from trainer.errors import SpecError

Object = dict[str, Any]
REFUSED = (
    'TrainJob in version "v1alpha1" cannot be handled as a TrainJob: strict decoding error: unknown field "spec.{}"'
)
# Of a real 2.3.
NULL = (
    'TrainJob resources reconciliation failed: JobSet.jobset.x-k8s.io "susp" is invalid: '
    '[spec.replicatedJobs[0].template.spec.template.metadata: Invalid value: "null": '
    'spec.replicatedJobs[0].template.spec.template.metadata in body must be of type object: "null", <nil>: Invalid '
    "value: null: some validation rules were not checked because the object was invalid; correct the existing errors "
    "to complete validation]"
)
SNAPSHOT = (
    "TrainJob resources reconciliation failed: unable to get runtime snapshot: invalid runtime snapshot: a snapshot "
    "configmap exists but is owned by another object"
)
NO_IMAGE = (
    'job "unk-node-0" creation failed with error: Job.batch "unk-node-0" is invalid: '
    "spec.template.spec.containers[0].image: Required value"
)
PAST_DEADLINE = {
    "type": "Failed",
    "status": "True",
    "reason": "DeadlineExceeded",
    "message": "TrainJob exceeded its active deadline",
    "lastTransitionTime": "2026-01-01T12:00:00Z",
}


def rendered() -> list[Object]:
    return job_objects(job_from({"preset": "tiny"}, {"cluster": {"job": "trainjob"}}))


def answer(message: str) -> ApiException:
    error = ApiException(status=400, reason="Bad Request")
    error.body = json.dumps({"message": message})
    return error


class Asked:
    """A cluster that knows all fields of a TrainJob's spec but some."""

    namespace, server = "team", "https://api"

    def __init__(self, *unknown: str) -> None:
        self.unknown = unknown
        self.created: list[Object] = []

    def delete(self, kind: str, name: str) -> None: ...

    def create(self, body: Object) -> Object:
        for field in self.unknown:
            if body["kind"] == "TrainJob" and field in body["spec"]:
                raise Cluster.refusal(self, "create trainjobs", answer(REFUSED.format(field)))  # type: ignore[arg-type]
        self.created.append(body)
        return body


def made(cluster: Asked) -> Object:
    *needs, job = rendered()
    return kubernetes._create(cluster, job, needs, None)  # type: ignore[arg-type]


def test_a_trainjob_has_a_deadline_of_its_own_where_the_cluster_knows_it() -> None:
    assert made(Asked())["spec"]["activeDeadlineSeconds"] == job_from({"preset": "tiny"}).cluster.deadline_seconds
    old = Asked("activeDeadlineSeconds")
    assert "activeDeadlineSeconds" not in made(old)["spec"]
    assert [item["kind"] for item in old.created] == ["ConfigMap", "NetworkPolicy", "TrainingRuntime", "TrainJob"]


def test_both_are_the_same_job_to_a_launcher_that_finds_it() -> None:
    objects = rendered()
    assert bounded(objects)["metadata"] == objects[-1]["metadata"]


def test_a_release_that_lacks_another_field_is_refused_in_one_line() -> None:
    with pytest.raises(UnknownFields) as caught:
        made(Asked("runtimeRef"))
    assert caught.value.fields == ["spec.runtimeRef"]
    assert str(caught.value) == (
        "cannot create trainjobs in namespace 'team': this cluster's release of Kubeflow Trainer does not know "
        "spec.runtimeRef; install Kubeflow Trainer 2.1 to 2.3 (yaongi doctor names what is there), or write "
        "cluster.job=pytorchjob"
    )


def test_other_refusals_of_a_trainjob_are_told_as_they_are() -> None:
    refusal = Cluster.refusal(Asked(), "create trainjobs", answer("it is Monday"))  # type: ignore[arg-type]
    assert type(refusal) is Refused and "it is Monday" in str(refusal)


def test_a_release_can_be_named_for_what_is_printed() -> None:
    objects = rendered()
    assert for_release(objects, "2.1") == objects
    assert for_release(objects, "2.3") == [*objects[:-1], bounded(objects)]
    with pytest.raises(SpecError, match=r"--trainer-version 2\.0 is not one of 2\.1, 2\.2, 2\.3"):
        for_release(objects, "2.0")
    with pytest.raises(SpecError, match=r"cluster\.job=trainjob"):
        for_release(job_objects(job_from({"preset": "tiny"})), "2.3")


@pytest.mark.parametrize("message", [NULL, SNAPSHOT])
def test_what_trainer_2_3_reports_in_passing_is_no_obstacle(message: str) -> None:
    event = {"reason": "TrainJobResourcesCreationFailed", "message": message}
    assert explain.creation_obstacle(event) is None


def test_a_job_that_jobset_cannot_make_is_hopeless() -> None:
    found = explain.creation_obstacle({"reason": "JobCreationFailed", "message": NO_IMAGE})
    assert found is not None and found.hopeless and "containers[0].image: Required value" in found.text


def test_a_trainjob_past_its_deadline_has_failed_though_its_jobs_are_still_called_active() -> None:
    status = {"conditions": [PAST_DEADLINE], "jobsStatus": [{"name": "node", "ready": 1, "active": 1}]}
    job = {**rendered()[-1], "status": status}
    job["metadata"] = {**job["metadata"], "uid": "1", "creationTimestamp": "2026-01-01T11:00:00Z"}
    assert not state.is_active(job) and state.is_past_deadline(job)
    answer = why(Situation(job["metadata"]["name"], "team", job))
    assert answer.state == "failed" and "activeDeadlineSeconds have passed" in answer.sentence
    assert "cluster.run_timeout_seconds" in answer.fix

"""What a job in a queue of Kueue carries, and how what Kueue wrote into it is taken out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manifests.kinds import KINDS, pod_template
from manifests.queue import before_admission, without_patches
from manifests.render import job_objects
from manifests.spec import JobSpec, job_from

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "kueue.json").read_text())  # of Kueue 0.17
every_kind = pytest.mark.parametrize("kind", KINDS)


def job(**cluster: Any) -> JobSpec:
    return job_from({"preset": "tiny"}, {"cluster": cluster})


@every_kind
def test_what_kueue_reads_comes_from_the_spec(kind: str) -> None:
    rendered = job_objects(job(job=kind, queue="team", queue_priority="urgent", topology={"required": "rack"}))
    assert rendered[-1]["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "urgent"
    metadata = pod_template(rendered)["metadata"]
    assert metadata["annotations"]["kueue.x-k8s.io/podset-required-topology"] == "rack"
    assert not [key for key in metadata["labels"] if "kueue" in key], "each pod would be a workload of its own"
    near = job_objects(job(job=kind, queue="team", topology={"preferred": "rack"}))
    assert pod_template(near)["metadata"]["annotations"]["kueue.x-k8s.io/podset-preferred-topology"] == "rack"


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ({"queue_priority": "urgent"}, "queue_priority is read by Kueue only for a job in a queue; name one in queue"),
        ({"topology": {"required": "rack"}}, "topology is read by Kueue only for a job in a queue"),
        ({"queue": "a", "topology": {}}, "write either required or preferred"),
        ({"queue": "a", "topology": {"required": "a", "preferred": "b"}}, "write either required or preferred"),
    ],
)
def test_what_kueue_would_not_read_or_refuse_is_told(cluster: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        job(**cluster)


@pytest.mark.parametrize("name", ["resumed", "placed"])
def test_a_job_is_as_it_was_before_its_admission(name: str) -> None:
    """The oracle is the template that Kueue kept in the Workload and restores when it takes an admission back."""
    admitted, workload = RECORDED[name]["job"], RECORDED[name]["workload"]
    (original,) = (pod_set["template"] for pod_set in workload["spec"]["podSets"])
    template = admitted["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert template["metadata"] != original["metadata"] and template["spec"] != original["spec"]
    made = before_admission(admitted, workload)["spec"]
    assert made["pytorchReplicaSpecs"]["Worker"]["template"] == original
    assert "suspend" not in made["runPolicy"] and "suspend" in admitted["spec"]["runPolicy"]
    unread = before_admission(admitted, None)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert unread["metadata"] == original["metadata"]
    assert unread["spec"] == template["spec"], "the flavor's node selector cannot be told from the job's own"


def test_what_kueue_writes_into_a_trainjob_is_taken_out_again() -> None:
    waiting = RECORDED["waiting"]["job"]
    assert waiting["spec"]["suspend"] and waiting["spec"]["runtimePatches"]
    assert before_admission(waiting, None)["spec"].keys() == {"trainer"}
    another = {"manager": "example.com/team", "trainingRuntimeSpec": {}}
    waiting["spec"]["runtimePatches"].append(another)
    assert before_admission(waiting, None)["spec"]["runtimePatches"] == [another]


def test_kueues_patches_of_a_trainjob_without_a_queue_are_left_out_and_nothing_else() -> None:
    """A real Kueue 0.17 writes this one at the creation of every TrainJob."""
    its = {"manager": "kueue.x-k8s.io/manager", "trainingRuntimeSpec": {"template": {"spec": {}}}}
    job = {"spec": {"suspend": True, "trainer": {"numNodes": 2}, "runtimePatches": [its]}}
    assert without_patches(job) == {"spec": {"suspend": True, "trainer": {"numNodes": 2}}}
    assert job["spec"]["runtimePatches"] == [its], "the job itself is not changed"
    plain = {"spec": {"runPolicy": {}}}
    assert without_patches(plain) == plain

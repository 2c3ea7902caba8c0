"""Every generated object against Kubernetes' own schemas, as `kubectl apply` would, unknown fields included."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from manifests import generate
from manifests.kinds import Object, pod_template

VERSION = "1.34"
MANIFESTS = Path(generate.__file__).parent
FILES = sorted([*MANIFESTS.glob("base/*.yaml"), *MANIFESTS.glob("examples/*.yaml")])
CUSTOM = ("kubeflow.org/", "trainer.kubeflow.org/", "monitoring.coreos.com/")


def objects(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def validate(item: Object) -> None:
    kubernetes_validate.validate(item, VERSION, strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_core_objects_have_no_unknown_or_ill_typed_field(path: Path) -> None:
    found = objects(path)
    for item in found:
        if not item["apiVersion"].startswith(CUSTOM):
            validate(item)
    assert found, "an empty file"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "examples"], ids=lambda path: path.name)
def test_what_operators_make_of_a_job_is_valid_too(path: Path) -> None:
    found = objects(path)
    metadata = {"metadata": {"name": "x"}}
    validate({"apiVersion": "v1", "kind": "Pod", **metadata, "spec": pod_template(found)["spec"]})
    for runtime in (item for item in found if item["kind"] == "TrainingRuntime"):
        (nodes,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        validate({"apiVersion": "batch/v1", "kind": "Job", **metadata, "spec": nodes["template"]["spec"]})


def test_an_unknown_field_would_be_noticed() -> None:
    (policy, *_) = objects(MANIFESTS / "base/networkpolicy.yaml")
    policy["spec"]["policyTypse"] = ["Ingress"]
    with pytest.raises(kubernetes_validate.ValidationError, match="policyTypse"):
        validate(policy)

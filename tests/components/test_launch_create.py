"""A job is created although webhooks are behind or starting; one that stays silent is named with the fix."""

from __future__ import annotations

from typing import Any

import pytest

from components.cluster.api import Refused
from components.launch import kubernetes
from manifests.render import job_objects
from manifests.spec import load_job

# Of Kueue 0.17, whose webhook is asked for every job of the cluster.
DOWN = (
    "cannot create pytorchjobs in namespace 'team': Internal error occurred: failed calling webhook "
    '"mpytorchjob.kb.io": failed to call webhook: Post "https://kueue-webhook-service.kueue-system.svc:443/'
    'mutate-kubeflow-org-v1-pytorchjob?timeout=10s": dial tcp 10.96.0.7:443: connect: connection refused (500)'
)
NOT_SEEN = "admission webhook \"vtrainjob.kb.io\" denied the request: runtime 'tiny-1' not found (403)"
FORBIDDEN = 'admission webhook "gate" denied the request: no cost centre (403)'


class Cluster:
    """Answers `create` with these errors, then with the object."""

    def __init__(self, *errors: str) -> None:
        self.errors = list(errors)

    def create(self, body: Any) -> Any:
        if self.errors:
            raise Refused(500, self.errors.pop(0))
        return body


@pytest.fixture
def create(monkeypatch: pytest.MonkeyPatch):
    job = job_objects(load_job("tiny"))[-1]
    now = [0.0]
    monkeypatch.setattr(kubernetes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(kubernetes.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return lambda *errors: kubernetes._create(Cluster(*errors), job, [], None)["metadata"]["name"]  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [DOWN, NOT_SEEN])
def test_a_webhook_that_is_behind_or_starting_is_waited_for(create, error):
    assert create(error, error).startswith("tiny-")


def test_kueue_that_stays_down_is_named_with_the_fix(create):
    with pytest.raises(Refused) as caught:
        create(*[DOWN] * 1000)
    said = str(caught.value)
    assert said.startswith(f"{DOWN}; Kueue, which checks every pod and job of the cluster") and "\n" not in said


def test_a_refusal_is_not_asked_again(create):
    with pytest.raises(Refused, match=r"no cost centre .*; change the job as the policy wants"):
        create(FORBIDDEN)

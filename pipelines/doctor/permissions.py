"""Whether this account has the launcher's rights, and whether the launcher pods' service accounts exist."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.kinds import Object
from manifests.rbac import ACCOUNTS, RULES
from pipelines.doctor.findings import Finding
from pipelines.doctor.look import Look

REVIEW = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


def permissions(look: Look) -> Iterator[Finding]:
    """Ask the API server for each right of the launcher's role, as the account of this kubeconfig or pod."""
    asked = sum(len(rule["resources"]) * len(rule["verbs"]) for rule in RULES)
    refused = refusals(look, RULES)
    if refused:
        yield Finding("permissions", "no", f"this account may not {', '.join(refused)}", granting(look))
    else:
        yield Finding("permissions", "ok", f"this account may do all {asked} things that the launcher does")


def refusals(look: Look, rules: list[Object]) -> list[str]:
    """What this account may not do of a role's rules, as `verbs resource`."""
    found = []
    for rule in rules:
        for resource in rule["resources"]:
            denied = [verb for verb in rule["verbs"] if not _allowed(look, rule["apiGroups"][0], resource, verb)]
            if denied:
                found.append(f"{'/'.join(denied)} {resource}")
    return found


def granting(look: Look) -> str:
    return f"python -m manifests.generate rbac {look.namespace} | kubectl apply -f -, and launch with its account"


def accounts(look: Look) -> Iterator[Finding]:
    """Service accounts for the launcher's pods; one is enough."""
    there = [name for name in ACCOUNTS if look.in_namespace("serviceaccounts", name)]
    if there:
        yield Finding("service account", "ok", ", ".join(there))
        return
    remedy = f"python -m manifests.generate rbac {look.namespace} | kubectl apply -f -"
    yield Finding("service account", "missing", f"neither {' nor '.join(ACCOUNTS)}; pods cannot launch jobs", remedy)


def _allowed(look: Look, group: str, resource: str, verb: str) -> bool:
    name, _, part = resource.partition("/")
    attributes = {"namespace": look.namespace, "group": group, "resource": name, "subresource": part, "verb": verb}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    return look.post(REVIEW, body)["status"]["allowed"]

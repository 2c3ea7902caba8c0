"""Whether this account has the launcher's rights, and whether the launcher pods' service accounts exist."""

from __future__ import annotations

from collections.abc import Iterator

from components.cluster.look import Look
from components.plan.admissible import refusals
from manifests.rbac import ACCOUNTS, RULES
from pipelines.doctor.findings import Finding


def permissions(look: Look) -> Iterator[Finding]:
    """Ask the API server for each right of the launcher's role, as the account of this kubeconfig or pod."""
    asked = sum(len(rule["resources"]) * len(rule["verbs"]) for rule in RULES)
    refused = refusals(look, RULES)
    if refused:
        yield Finding("permissions", "no", f"this account may not {', '.join(refused)}", granting(look))
    else:
        yield Finding("permissions", "ok", f"this account may do all {asked} things that the launcher does")


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

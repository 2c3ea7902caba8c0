"""The launcher's rights, only in its own namespace."""

from __future__ import annotations

from manifests import queue
from manifests.kinds import DEVICE_CLAIMS, KINDS, TRAINJOB, Object

ROLE = "yaongi-launcher"
# The account of KFP's steps, and our own for a launcher without KFP.
ACCOUNTS = ("pipeline-runner", ROLE)
RULES: list[Object] = [
    *(
        {
            "apiGroups": [kind.group],
            "resources": [kind.plural],
            "verbs": ["create", "get", "list", "watch", "patch", "delete"],
        }
        for kind in KINDS.values()
    ),
    {
        "apiGroups": [TRAINJOB.group],
        "resources": ["trainingruntimes"],
        "verbs": ["create", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "patch", "delete"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["create", "patch", "delete"]},
    {
        "apiGroups": [DEVICE_CLAIMS.group],
        "resources": [DEVICE_CLAIMS.plural],
        "verbs": ["create", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list", "watch"]},
    {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["get"]},
]
# To say why a job waits in a queue; without these rights the launcher works and says less.
QUEUE_RULES: list[Object] = [
    {"apiGroups": [queue.GROUP], "resources": ["workloads"], "verbs": ["list"]},
    {"apiGroups": [queue.GROUP], "resources": ["localqueues"], "verbs": ["get"]},
    {"apiGroups": [queue.VISIBILITY_GROUP], "resources": ["localqueues/pendingworkloads"], "verbs": ["get"]},
]


def rbac(namespace: str) -> list[Object]:
    """Service account, role and binding. A binding names its subjects' namespace, so this is per namespace."""
    labels = {"app.kubernetes.io/part-of": "yaongi"}
    metadata = {"name": ROLE, "namespace": namespace, "labels": labels}
    group = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": dict(metadata)},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": dict(metadata), "rules": RULES + QUEUE_RULES},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": dict(metadata),
            "roleRef": {"apiGroup": group, "kind": "Role", "name": ROLE},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace} for name in ACCOUNTS],
        },
    ]

"""A server of an exported model (trainer/serving) in the cluster: Deployment, Service, network policy.

A roll-out breaks no answer: a new pod is ready before an old one ends (maxUnavailable 0). The old one is told at the
beginning of its end (SIGUSR1), so that it closes each connection after its answer; meanwhile the Service forgets it;
then SIGTERM lets running answers finish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manifests.clusterspec import ClusterSpec, StorageSpec
from manifests.kinds import Object
from manifests.names import APP_LABEL, SERVER_APP
from manifests.network import server_policy
from manifests.objects import USER_ID, without_rights
from trainer.serving.options import Device, Weights

PullPolicy = Literal["IfNotPresent", "Always", "Never"]
PORT, METRICS_PORT = 8000, 9400
FORGETTING_SECONDS = 10  # until no part of the cluster sends new connections to a pod that ends
EXIT_SECONDS = 15  # of the process, after its last answer
PROBE_SECONDS = 2
KEY = "key"  # of the secret


@dataclass(frozen=True)
class Server:
    """
    Attributes:
        export: folder of the export on the volume of checkpoints.
        secret: its key `key` is the API key; "": none, the server is open.
        rows, length, max_waiting, device, weights, grace_seconds: the server's options.
        start_seconds: for loading the model.
    """

    export: str
    image: str = ClusterSpec().image
    image_pull_policy: PullPolicy = "IfNotPresent"
    claim: str = StorageSpec().checkpoints_pvc
    secret: str = "yaongi-api-key"
    replicas: int = 1
    rows: int = 64
    length: int = 0
    max_waiting: int = 256
    device: Device = "auto"
    weights: Weights = "auto"
    grace_seconds: int = 60
    start_seconds: int = 600
    cpus: str | int = 2
    memory: str = "8Gi"
    gpus: int = 0


def objects(server: Server) -> list[Object]:
    labels = {APP_LABEL: SERVER_APP}
    deployment: Object = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": SERVER_APP, "labels": dict(labels)},
        "spec": {
            "replicas": server.replicas,
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": server.start_seconds + 60,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "selector": {"matchLabels": dict(labels)},
            "template": {
                "metadata": {"labels": dict(labels)},
                "spec": _pod(server),
            },
        },
    }
    service: Object = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVER_APP, "labels": dict(labels)},
        "spec": {
            "selector": dict(labels),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }
    return [deployment, service, server_policy(PORT, METRICS_PORT)]


def _pod(server: Server) -> Object:
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": FORGETTING_SECONDS + server.grace_seconds + EXIT_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(server)],
        "volumes": [
            {"name": "checkpoints", "persistentVolumeClaim": {"claimName": server.claim}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        ],
    }


def _container(server: Server) -> Object:
    limits: Object = {"memory": server.memory}
    if server.gpus:
        limits["nvidia.com/gpu"] = server.gpus
    cpu = {"resourceFieldRef": {"resource": "requests.cpu"}}  # rounded up
    env: list[Object] = [
        {"name": "OMP_NUM_THREADS", "valueFrom": cpu},
        {"name": "HOME", "value": "/tmp"},
        {"name": "TMPDIR", "value": "/tmp"},
        {"name": "XDG_CACHE_HOME", "value": "/tmp/cache"},
        {"name": "TRITON_CACHE_DIR", "value": "/tmp/cache/triton"},
    ]
    if server.secret:
        env.append({"name": "YAONGI_API_KEY", "valueFrom": {"secretKeyRef": {"name": server.secret, "key": KEY}}})
    return {
        "name": "server",
        "image": server.image,
        "imagePullPolicy": server.image_pull_policy,
        "args": arguments(server),  # not command: the image's entrypoint forwards signals
        "env": env,
        "ports": [
            {"name": "http", "containerPort": PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "startupProbe": {**_probe("/ready"), "failureThreshold": -(-server.start_seconds // PROBE_SECONDS)},
        "readinessProbe": {**_probe("/ready"), "failureThreshold": 4},
        "livenessProbe": {**_probe("/health"), "failureThreshold": 5, "timeoutSeconds": 10},
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", f"kill -USR1 1; sleep {FORGETTING_SECONDS}"]}}},
        "resources": {"requests": {"cpu": server.cpus, **limits}, "limits": limits},
        "securityContext": without_rights(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "checkpoints", "mountPath": StorageSpec().checkpoints_dir, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def arguments(server: Server) -> list[str]:
    """The server's command line."""
    return [
        *("python", "-m", "trainer.serving", f"{StorageSpec().checkpoints_dir}/{server.export}"),
        *("--host=0.0.0.0", f"--port={PORT}", f"--metrics-port={METRICS_PORT}"),
        *(f"--rows={server.rows}", f"--length={server.length}", f"--max-waiting={server.max_waiting}"),
        *(f"--device={server.device}", f"--weights={server.weights}", f"--grace={server.grace_seconds}"),
    ]


def _probe(path: str) -> Object:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": PROBE_SECONDS, "timeoutSeconds": 5}

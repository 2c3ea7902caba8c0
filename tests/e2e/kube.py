"""What the end-to-end tests do to a cluster, through kubectl: pods in a namespace of restricted Pod Security."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

Object = dict[str, Any]
T = TypeVar("T")
PIPELINE_IMAGE = os.environ.get("YAONGI_PIPELINE_IMAGE", "localhost/yaongi-pipeline:0.1.0")
TRAINER_IMAGE = os.environ.get("YAONGI_TRAINER_IMAGE", "localhost/yaongi-trainer:0.1.0")
READS = ("get", "logs", "auth")
BUSY = re.compile(
    r"[Tt]imeout|timed out|connection refused|EOF|unable to handle the request|Too many requests|failed calling webhook"
)
MOUNTS = {"/mnt/datasets": "llm-datasets-pvc", "/mnt/checkpoints": "llm-checkpoints-pvc"}


class Namespace:
    """One namespace; if kubectl fails, a method fails the test with its message."""

    def __init__(self, name: str) -> None:
        self.name = name

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        command = ["kubectl", "--namespace", self.name, *arguments]
        reads = arguments[0] in READS or "--dry-run=server" in arguments
        for pause in (1, 2, 4, 8, 0) if reads else (0,):
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=600)
            if not (done.returncode and pause and BUSY.search(done.stderr)):
                break
            time.sleep(pause)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: Object, while_refused: str = "failed calling webhook") -> None:
        """Apply; retried while the refusal has this text, by default while a webhook's operator does not answer."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})

        def refusal() -> str:
            try:
                self.kubectl("apply", "-f", "-", stdin=text)
            except AssertionError as error:
                if while_refused not in str(error):
                    raise
                return str(error)
            return ""

        wait_for("the objects to be admitted", refusal, 180, is_there=lambda text: not text)

    def apply_when_admitted(self, *objects: Object) -> None:
        """Retries while an admission webhook has not yet seen the objects that were applied just before."""
        self.apply(*objects, while_refused="")

    def made(self) -> None:
        """Wait for what controllers put into every new namespace; without the account no pod is admitted."""
        what = ("serviceaccount/default", "configmap/kube-root-ca.crt")
        wait_for(
            "the namespace's own objects",
            lambda: len(self.kubectl("get", *what, "-o", "name", "--ignore-not-found").split()) == 2,
            120,
        )

    def find(self, kind: str, *selection: str) -> list[Object]:
        """Objects of a kind, as returned by `kubectl get KIND SELECTION`."""
        return json.loads(self.kubectl("get", kind, *selection, "-o", "json"))["items"]

    def get(self, kind: str, name: str) -> Object | None:
        """None if it is absent."""
        found = self.kubectl("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(found) if found else None

    def trainer(self) -> str:
        """The release of Kubeflow Trainer by the fields of its TrainJobs: 2.1, or 2.3."""
        (definition,) = self.find("crds", "--field-selector", "metadata.name=trainjobs.trainer.kubeflow.org")
        (version,) = definition["spec"]["versions"]
        fields = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        return "2.1" if "podTemplateOverrides" in fields else "2.3"

    def shows_progress(self) -> bool:
        """Whether Trainer takes the progress of TrainJobs: an alpha feature, off by default."""
        config = ("get", "configmap", "kubeflow-trainer-config", "-n", "kubeflow-system", "-o", "yaml")
        return "TrainJobStatus: true" in self.kubectl(*config, "--ignore-not-found")

    def show(self, title: str) -> None:
        """Print the state of the namespace to the test's log."""
        print(f"--- {title}\n{self.kubectl('get', 'pytorchjobs,trainjobs,pods', '-o', 'wide')}", flush=True)

    def exit_of(self, pod: str, timeout: float, *, meanwhile: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """Wait for a pod's only container to end, calling `meanwhile` about every second; (exit code, its log)."""

        def code() -> int | None:
            meanwhile()
            status = self.find("pods", "--field-selector", f"metadata.name={pod}")[0]["status"]
            state = status.get("containerStatuses", [{}])[0].get("state", {})
            return state["terminated"]["exitCode"] if "terminated" in state else None

        found = wait_for(f"pod {pod} to end", code, timeout, is_there=lambda value: value is not None)
        log = self.kubectl("logs", pod)
        print(f"--- log of {pod} (exit {found})\n{log}", flush=True)
        return found, log

    def running(self, pod: str, timeout: float = 300) -> None:
        self.kubectl("wait", "--for=condition=Ready", f"pod/{pod}", f"--timeout={timeout:g}s")

    def execute(self, pod: str, *command: str, check: bool = True) -> str:
        return self.kubectl("exec", pod, "--", *command, check=check)


def wait_for(
    what: str, value: Callable[[], T], timeout: float, *, is_there: Callable[[T], bool] = bool, every: float = 1.0
) -> T:
    """Wait for the first `value()` that is not None.

    Raises:
        AssertionError: there is none within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not is_there(found := value()):
        assert time.monotonic() < deadline, f"waited {timeout:g} s in vain for {what}; last seen: {found!r}"
        time.sleep(every)
    return found


def pod(
    name: str,
    image: str,
    command: list[str],
    *,
    account: str = "default",
    env: dict[str, str] | None = None,
    mounts: dict[str, str] = MOUNTS,
    config_map: tuple[str, str] | None = None,
    labels: dict[str, str] | None = None,
) -> Object:
    """A pod that the restricted standard admits: `command` runs as uid 1000 on a read-only root with an emptyDir /tmp.

    Args:
        account: service account; the pod gets its token unless it is `default`.
        mounts: mount path → claim.
        config_map: (mount path, ConfigMap).
    """
    volumes: list[Object] = [{"name": "tmp", "emptyDir": {}}]
    places = [{"name": "tmp", "mountPath": "/tmp"}]
    for index, (path, claim) in enumerate(mounts.items()):
        volumes.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
        places.append({"name": f"claim-{index}", "mountPath": path})
    if config_map:
        volumes.append({"name": "config", "configMap": {"name": config_map[1]}})
        places.append({"name": "config", "mountPath": config_map[0]})
    itself = {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid", "POD_NAMESPACE": "metadata.namespace"}
    variables: list[Object] = [{"name": key, "value": value} for key, value in (env or {}).items()]
    variables += [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in itself.items()]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": account,
            "automountServiceAccountToken": account != "default",
            "terminationGracePeriodSeconds": 30,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    # args, not command: the image's own entry (umask, tini) stays PID 1.
                    "args": command,
                    "env": variables,
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": places,
                }
            ],
            "volumes": volumes,
        },
    }

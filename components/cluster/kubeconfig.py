"""Check whether a cluster is configured, before the slow import of the Kubernetes client."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.errors import LaunchError

POD_VARIABLE = "KUBERNETES_SERVICE_HOST"


class NoCluster(LaunchError):
    """No cluster is configured, or the configuration is not usable; `reason` says which."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"no cluster to launch on: {reason}; set KUBECONFIG to a readable kubeconfig, or run on this machine with "
            "cluster.target=local"
        )


def require_cluster() -> None:
    """Return if this is a pod or a kubeconfig exists. Whether it is usable is left to the client.

    Raises:
        NoCluster
    """
    named = os.environ.get("KUBECONFIG")
    if not named and POD_VARIABLE in os.environ:
        return
    files = [Path(file) for file in named.split(os.pathsep)] if named else [Path.home() / ".kube" / "config"]
    if not any(file.exists() for file in files):
        raise NoCluster(f"{files[0]} does not exist")

"""Is a cluster named to this process? Asked before the Kubernetes client is imported, for which nobody should wait who
has none."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.errors import LaunchError

POD_VARIABLE = "KUBERNETES_SERVICE_HOST"


class NoCluster(LaunchError):
    """No cluster is named, or by a configuration that cannot be used; `reason` says which."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"no cluster to launch on: {reason}; set KUBECONFIG to a readable kubeconfig, or run on this machine with "
            "cluster.target=local"
        )


def require_cluster() -> None:
    """Return where this is a pod, or a kubeconfig is there; whether it can be used, the client finds out.

    Raises:
        NoCluster
    """
    named = os.environ.get("KUBECONFIG")
    if not named and POD_VARIABLE in os.environ:
        return
    files = [Path(file) for file in named.split(os.pathsep)] if named else [Path.home() / ".kube" / "config"]
    if not any(file.exists() for file in files):
        raise NoCluster(f"{files[0]} does not exist")

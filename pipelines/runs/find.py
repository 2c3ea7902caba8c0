"""Runs of this machine and of the cluster together: what is not known here is looked for there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from components.cluster.kubeconfig import NoCluster, require_cluster
from pipelines.runs import local as runs
from pipelines.runs import view
from pipelines.runs.kept import kept
from pipelines.runs.kept import view as view_of_kept
from pipelines.runs.local import Run, UnknownRun, named
from pipelines.runs.view import View
from trainer.errors import LaunchError

KFP_RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

if TYPE_CHECKING:  # it takes a second, which nobody should wait for whose run is here
    from components.cluster.api import Cluster
    from pipelines.runs.cluster import RemoteRun


def is_kfp(text: str) -> bool:
    """Whether this is the id of a run on Kubeflow Pipelines."""
    return KFP_RUN_ID.fullmatch(text) is not None


def connect(namespace: str) -> Cluster:
    """The cluster's namespace; "" for that of the kubeconfig's context."""
    require_cluster()
    from components.cluster.api import Cluster

    return Cluster.connect(namespace or None)


def find_or_ask(text: str, namespace: str, workdir: Path) -> tuple[Run | None, Cluster | None]:
    """The run of this machine, or the cluster to ask: for an unknown one, and where a namespace is given.

    Raises:
        UnknownRun, SpecError: none here and no cluster to ask; or several.
        LaunchError: the namespace's cluster cannot be asked.
    """
    if namespace:
        return None, connect(namespace)
    try:
        return runs.find(text, workdir), None
    except UnknownRun as unknown:
        try:
            return None, connect("")
        except LaunchError:
            raise unknown from None


def find(text: str, namespace: str, workdir: Path) -> Run | RemoteRun:
    """A run of this machine or of the cluster.

    Raises:
        as `find_or_ask`, or none there either.
    """
    here, cluster = find_or_ask(text, namespace, workdir)
    if cluster is None:
        assert here is not None
        return here
    from pipelines.runs import cluster as remote

    return remote.find(text, cluster, named(text, workdir))


def looking_at(text: str, namespace: str, workdir: Path, host: str) -> Callable[[], View]:
    """What gives a new view of a run each time."""
    if is_kfp(text):
        from pipelines.runs import kfp as kfp_runs

        return lambda: kfp_runs.view(host, text)
    try:
        found = find(text, namespace, workdir)
    except UnknownRun:
        begins = named(text, workdir) or text
        stopped = [each for each in kept(workdir, namespace) if each.name.startswith(begins)]
        if len(stopped) != 1:
            raise
        return lambda: view_of_kept(stopped[0])
    if isinstance(found, Run):
        return lambda: view.of_local(found)
    from pipelines.runs import cluster as remote

    return lambda: remote.view(remote.find(found.name, found.cluster))


def all_views(namespace: str, workdir: Path, console: Console) -> list[View]:
    """Those of the cluster only where a namespace is given; a cluster that cannot be asked costs a line.

    Also those that were stopped from here, of which the cluster knows nothing.

    Raises:
        LaunchError: the namespace's cluster cannot be asked.
    """
    views = [] if namespace else [view.of_local(each) for each in runs.local_runs(workdir).values()]
    stopped = kept(workdir, namespace)
    try:
        cluster = connect(namespace)
        from pipelines.runs import cluster as remote

        there = remote.remote_runs(cluster)
        views += [remote.view(each) for each in there.values()]
        again = {job["metadata"]["name"] for each in there.values() for job in each.jobs.values()}
        places = ("", cluster.namespace)
        stopped = [each for each in stopped if each.namespace not in places or each.name not in again]
    except LaunchError as error:
        if namespace:
            raise
        if not isinstance(error, NoCluster):
            console.print(f"cluster: {error}", style="dim", soft_wrap=True, highlight=False)
    return views + [view_of_kept(each) for each in stopped]

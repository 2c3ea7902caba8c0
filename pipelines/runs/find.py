"""Find the run that a name means: the one place that chooses between this machine, a cluster and Kubeflow Pipelines.

A run on Kubeflow Pipelines is named only by its id there. Any other name means a run of this machine; a run of the
cluster if this machine has none of that name or a namespace is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from components.cluster.kubeconfig import NoCluster, require_cluster
from components.running import one_line
from pipelines.runs import kept, local
from pipelines.runs.names import UnknownRun, named
from pipelines.runs.protocol import Run
from pipelines.runs.view import View
from trainer.errors import ForeseenError, LaunchError

KFP_RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

if TYPE_CHECKING:  # the import takes a second, which a local run does not need
    from components.cluster.api import Cluster


@dataclass(frozen=True)
class Where:
    """Where to look, from the options; "" for no namespace or host."""

    namespace: str
    workdir: Path
    host: str = ""


def is_kfp(text: str) -> bool:
    """Whether this is the id of a run on Kubeflow Pipelines."""
    return KFP_RUN_ID.fullmatch(text) is not None


def connect(namespace: str) -> Cluster:
    """Connect to a namespace; "" for that of the kubeconfig's context."""
    require_cluster()
    from components.cluster.api import Cluster

    return Cluster.connect(namespace or None)


def find(text: str, where: Where, also_stopped: bool = False) -> Run:
    """The run that `text` means.

    Args:
        also_stopped: include cluster runs that were stopped from here; the cluster no longer knows them.

    Raises:
        UnknownRun, SpecError: none anywhere, or several.
        LaunchError: the namespace's cluster cannot be reached.
    """
    if is_kfp(text):
        return _of_kfp(text, where)
    if where.namespace:
        there = connect(where.namespace)
    else:
        try:
            return local.find(text, where.workdir)
        except UnknownRun as unknown:
            try:
                there = connect("")
            except LaunchError:
                raise unknown from None
    from pipelines.runs import cluster

    look = cluster.find_also_stopped if also_stopped else cluster.find
    return look(text, there, where.workdir, named(text, where.workdir))


def find_to_explain(text: str, where: Where) -> Run:
    """As `find`, but prefers any job of the cluster, even a deleted one, to a run of this machine.

    Raises:
        As `find`.
    """
    if is_kfp(text):
        return _of_kfp(text, where)
    try:
        there = connect(where.namespace)
        from pipelines.runs import cluster

        return cluster.find_job(text, there, where.workdir)
    except (LaunchError, UnknownRun) as on_cluster:
        if where.namespace:
            raise
        try:
            return local.find(text, where.workdir)
        except UnknownRun as here:
            if not isinstance(on_cluster, NoCluster):
                raise on_cluster from None
            hint = "set KUBECONFIG to a readable kubeconfig"
            raise LaunchError(f"{here}, and no cluster is configured ({on_cluster.reason}); {hint}") from None


def looking_at(text: str, where: Where) -> Callable[[], View]:
    """A function that returns the current view of a run at each call; includes runs that were stopped from here.

    Raises:
        As `find`.
    """
    try:
        return find(text, where).view
    except UnknownRun:
        begins = named(text, where.workdir) or text
        stopped = [each for each in kept.kept(where.workdir, where.namespace) if each.name.startswith(begins)]
        if len(stopped) != 1:
            raise
        return stopped[0].view


def all_views(where: Where, console: Console) -> list[View]:
    """Views of all runs: local ones (unless a namespace is given), the cluster's, and those stopped from here.

    Without a namespace, a cluster that cannot be reached only prints a line.

    Raises:
        LaunchError: the namespace's cluster cannot be reached.
    """
    views = [] if where.namespace else [_listed(each) for each in local.local_runs(where.workdir).values()]
    stopped = kept.kept(where.workdir, where.namespace)
    try:
        there = connect(where.namespace)
        from pipelines.runs import cluster

        runs = cluster.cluster_runs(there, where.workdir)
        views += [each.as_found() for each in runs.values()]
        again = {job["metadata"]["name"] for each in runs.values() for job in each.jobs.values()}
        places = ("", there.namespace)
        stopped = [each for each in stopped if each.namespace not in places or each.name not in again]
    except LaunchError as error:
        if where.namespace:
            raise
        if not isinstance(error, NoCluster):
            console.print(f"cluster: {error}", style="dim", soft_wrap=True, highlight=False)
    return views + [each.view() for each in stopped]


def _listed(run: local.LocalRun) -> View:
    """A run whose files cannot be used does not hide the others."""
    try:
        return run.view()
    except ForeseenError as error:
        return View(run.name, "here", "unreadable", one_line(error))


def _of_kfp(run_id: str, where: Where) -> Run:
    from pipelines.runs.kfp.run import KfpRun

    return KfpRun(run_id, where.host)

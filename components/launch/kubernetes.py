"""Run one task as a job of the cluster: create or adopt it, have it followed to its end, and leave nothing running.

The job's name is a function of the spec, so a launcher that died is replaced by starting it again. A launcher that is
stopped, or gives up, takes its job along: nothing keeps GPUs without somebody watching.
"""

from __future__ import annotations

import copy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from http import HTTPStatus
from pathlib import Path
from types import FrameType

from components.cluster import state
from components.cluster.api import ApiUnreachable, Cluster, Refused
from components.launch.follow import Follower, JobFailed
from components.launch.lease import held
from manifests.kinds import JobKind, Object, kind_of, pod_template
from manifests.names import DIGEST_ANNOTATION, PIPELINE_LABEL, Task
from manifests.render import job_objects
from manifests.spec import ClusterSpec, JobSpec
from trainer.errors import LaunchError
from trainer.exitcodes import ExitCode
from trainer.process.limits import UNWATCHED_VARIABLE

CREATION_PATIENCE_SECONDS = 15


def show(line: str) -> None:
    print(line, flush=True)


def run(job: JobSpec, task: Task = "train", pipeline_run: str = "") -> None:
    """Run `task` of `job` on the cluster; returns when it has succeeded.

    Args:
        pipeline_run: id of the pipeline's run that the job is marked with, "" without a pipeline.

    Raises:
        LaunchError: it could not start or did not succeed; one line: what, where, how to mend.
    """
    cluster = Cluster.connect(job.cluster.namespace)
    # A launcher outside the cluster may not have the volume; then there is no lease, as for a job applied by hand.
    mounted = Path(job.storage.checkpoints_dir).is_dir()
    with held(job.run_dir) if mounted else nullcontext(_nothing) as let_lease_lapse:
        objects = job_objects(job, task)
        if pipeline_run:
            objects[-1]["metadata"]["labels"][PIPELINE_LABEL] = pipeline_run
        launch(cluster, objects, job.cluster, on_leftover=let_lease_lapse)


def _nothing() -> None:
    pass


def launch(
    cluster: Cluster,
    objects: Sequence[Object],
    limits: ClusterSpec,
    write: Callable[[str], None] = show,
    on_leftover: Callable[[], None] = _nothing,
) -> None:
    """Create or adopt a job and follow it to its end.

    Args:
        objects: what the job needs, then the job, as `job_objects` renders them.
        limits: the time limits and the grace period are read, nothing else.
        write: takes each line of worker 0's log, and the launcher's own, marked `launcher:`.
        on_leftover: called when the job may still run although it was to be stopped.

    Raises:
        LaunchError: as `run`. Nothing is left running then, unless `on_leftover` was called.
    """
    *needs, job = objects
    kind, name = kind_of(job), job["metadata"]["name"]
    _require_claims(cluster, pod_template(objects))
    current = _make_room(cluster, job, limits, write)
    ours = current is not None  # to be stopped if this launcher gives up
    with _stop_on_sigterm():
        try:
            if current is None:
                ours = True  # from here on: a creation whose answer is lost may have taken place
                try:
                    current = _create(cluster, job, needs, cluster.own_pod())
                except Refused:
                    ours = False
                    raise
                _hand_over(cluster, needs, current)
                write(f"launcher: created job {name} in namespace {cluster.namespace}")
            else:
                _adopt(cluster, current, job)
                write(f"launcher: job {name} in namespace {cluster.namespace} is there already; following it")
            Follower(cluster, current, limits, write).follow()
        except JobFailed:
            raise
        except BaseException as error:  # also a signal; it may have come while the job was being created
            to_stop = ours or not isinstance(error, LaunchError)
            if to_stop:
                with _undisturbed():
                    if not stop(cluster, kind, name, limits.grace_seconds, write):
                        on_leftover()
            raise


def _require_claims(cluster: Cluster, template: Object) -> None:
    volumes = template["spec"].get("volumes", [])
    for claim in (v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v):
        if not cluster.claim_exists(claim):
            raise LaunchError(
                f"volume claim '{claim}' does not exist in namespace '{cluster.namespace}'; create it "
                "(manifests/base/storage.yaml) or set storage.datasets_pvc and storage.checkpoints_pvc"
            )


def _make_room(cluster: Cluster, job: Object, limits: ClusterSpec, write: Callable[[str], None]) -> Object | None:
    """The running job of this name; None when there is none and its pods are gone.

    A finished one is deleted also if it succeeded: it would not be run again if what it made were still there.
    """
    kind, name = kind_of(job), job["metadata"]["name"]
    current = cluster.get(kind.kind, name)
    if current is not None and "deletionTimestamp" not in current["metadata"]:
        digest = job["metadata"]["annotations"][DIGEST_ANNOTATION]
        same = current["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION) == digest
        if state.is_active(current) and not same:
            raise LaunchError(
                f"job {name} is already running in namespace '{cluster.namespace}' with other settings; wait for it, "
                f"or stop it with: kubectl delete {kind.kind.lower()} {name} -n {cluster.namespace}"
            )
        if state.is_active(current):
            return current
        write(f"launcher: deleting the finished job {name} to run it again")
        cluster.delete(kind.kind, name)
    _wait_until_gone(cluster, kind, name, limits.grace_seconds, write)
    return None


def start(
    cluster: Cluster, objects: Sequence[Object], limits: ClusterSpec, write: Callable[[str], None] = show
) -> None:
    """Create a job that nobody follows, as one applied by hand; a finished one of its name is deleted first.

    A former launcher's lease may lie on the volume still. Its pods are told that nobody renews it.

    Raises:
        LaunchError: it runs already, or cannot be created.
    """
    objects = copy.deepcopy(list(objects))
    environment = state.container(pod_template(objects)).setdefault("env", [])
    if all(variable["name"] != UNWATCHED_VARIABLE for variable in environment):
        environment.append({"name": UNWATCHED_VARIABLE, "value": "1"})
    *needs, job = objects
    name = job["metadata"]["name"]
    _require_claims(cluster, pod_template(objects))
    if _make_room(cluster, job, limits, write) is not None:
        raise LaunchError(f"job {name} runs already in namespace '{cluster.namespace}'")
    _hand_over(cluster, needs, _create(cluster, job, needs, owner=None))
    write(f"created job {name} in namespace {cluster.namespace}")


def _create(cluster: Cluster, job: Object, needs: Sequence[Object], owner: Object | None) -> Object:
    body = {**job, "metadata": {**job["metadata"], **({"ownerReferences": [owner]} if owner else {})}}
    # Before the job, whose pods would otherwise fail to mount it at first.
    for need in needs:
        _replace(cluster, need)
    try:
        # The operator answers from a copy of the cluster's state that may lag behind what was created just now.
        return _patiently(lambda: _create_once(cluster, body), lambda error: "must be created before" in str(error))
    except Refused as error:
        if error.status != HTTPStatus.CONFLICT:  # then another launcher was faster, and it is that one's
            for need in needs:
                cluster.delete(need["kind"], need["metadata"]["name"])
        raise


def _hand_over(cluster: Cluster, needs: Sequence[Object], job: Object) -> None:
    """What the job needs is collected with it."""
    for need in needs:
        cluster.own(need["kind"], need["metadata"]["name"], _reference(job))


def _create_once(cluster: Cluster, body: Object) -> Object:
    """The object, made by the first or a second request: the answer to the first one may be all that was lost."""
    try:
        return cluster.create(body)
    except ApiUnreachable:
        return cluster.get(body["kind"], body["metadata"]["name"]) or cluster.create(body)


def _replace(cluster: Cluster, need: Object) -> None:
    """Deleted and created anew: a patched one could still belong to a deleted job and vanish with it."""
    for is_last in (False, True):
        cluster.delete(need["kind"], need["metadata"]["name"])
        try:
            # A runtime is gone only when its operator has noticed that no job refers to it any more.
            _patiently(lambda: cluster.create(need), lambda error: error.status == HTTPStatus.CONFLICT)
            return
        except ApiUnreachable:  # the answer may be all that was lost
            if is_last:
                raise


def _patiently(create: Callable[[], Object], may_pass: Callable[[Refused], bool]) -> Object:
    deadline = time.monotonic() + CREATION_PATIENCE_SECONDS
    while True:
        try:
            return create()
        except Refused as error:
            if not may_pass(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _adopt(cluster: Cluster, current: Object, job: Object) -> None:
    """The launcher that made the job may be gone; from now on it lives and dies with this one and its pipeline."""
    labels, name = {PIPELINE_LABEL: job["metadata"]["labels"].get(PIPELINE_LABEL)}, current["metadata"]["name"]
    try:
        cluster.own(current["kind"], name, cluster.own_pod(), labels)
    except Refused as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        raise LaunchError(
            f"job {name} in namespace '{cluster.namespace}' was just being deleted by somebody else; start again"
        ) from None


def _reference(job: Object) -> Object:
    metadata = job["metadata"]
    return {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": metadata["name"], "uid": metadata["uid"]}


def _wait_until_gone(
    cluster: Cluster, kind: JobKind, name: str, grace_seconds: int, write: Callable[[str], None]
) -> None:
    """A job created while pods of its predecessor still end would wait for them without saying so."""
    patience = grace_seconds + 60
    deadline = time.monotonic() + patience
    told = False
    while cluster.get(kind.kind, name) is not None or cluster.pods(kind, name):
        if time.monotonic() > deadline:
            pods = ", ".join(pod["metadata"]["name"] for pod in cluster.pods(kind, name)) or "the job itself"
            raise LaunchError(
                f"job {name} was deleted, but after {patience} s {pods} is still there; its node may be lost: "
                f"kubectl delete pod -n {cluster.namespace} --force --grace-period=0 <pod>"
            )
        if not told:
            write(f"launcher: waiting for the pods of the former job {name} to end")
            told = True
        time.sleep(1)


def stop(cluster: Cluster, kind: JobKind, name: str, grace_seconds: int, write: Callable[[str], None]) -> bool:
    """Delete the job and wait for its pods, which save a checkpoint; whether all are gone.

    Raises nothing of its own: the error that led here is what gets raised.
    """
    write(f"launcher: deleting job {name}; its workers have {grace_seconds} s to save a checkpoint")
    try:
        for pause in (4, 8, 0):
            try:
                cluster.delete(kind.kind, name)
                break
            except ApiUnreachable:
                if not pause:
                    raise
                time.sleep(pause)
        _wait_until_gone(cluster, kind, name, grace_seconds, lambda line: None)
        write(f"launcher: job {name} is gone")
        return True
    except LaunchError as error:
        write(f"launcher: the job may still run: {error}")
        return False


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does, so that it can clean up; the process then exits with 143."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(int(ExitCode.TERMINATED))

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A further signal does not cut the block short: the job would run on, and nobody would watch it or know."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

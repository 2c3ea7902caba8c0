"""Run one task as a job of the cluster: create or adopt it, follow it to its end, and leave nothing running.

The job's name is a function of the spec, so a launcher that died is replaced by starting it again. A launcher that is
stopped or gives up deletes its job: no job holds GPUs unwatched.
"""

from __future__ import annotations

import copy
import re
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
from components.cluster.api import ApiUnreachable, Cluster, Refused, UnknownFields
from components.diagnose.causes import CREATION, fix_for
from components.launch.follow import Follower, JobFailed
from components.launch.lease import held
from manifests.clusterspec import ClusterSpec
from manifests.kinds import TRAINJOB, JobKind, Object, kind_of, pod_template
from manifests.names import DIGEST_ANNOTATION, PIPELINE_LABEL, Task
from manifests.render import job_objects
from manifests.spec import JobSpec
from manifests.trainjob import DEADLINE, bounded
from trainer.errors import LaunchError
from trainer.exitcodes import ExitCode
from trainer.process.limits import UNWATCHED_VARIABLE

CREATION_PATIENCE_SECONDS = 60
# Refusals that may pass: the caches of Trainer and Kueue may not yet have the runtime just created, and a webhook that
# does not answer may be starting.
NOT_YET = re.compile(r"must be created before|runtime '[^']*' not found|failed calling webhook")


def show(line: str) -> None:
    print(line, flush=True)


def run(job: JobSpec, task: Task = "train", pipeline_run: str = "") -> None:
    """Run `task` of `job` on the cluster; returns after it has succeeded.

    Args:
        pipeline_run: id of the pipeline run for the job's label, "" without a pipeline.

    Raises:
        LaunchError: it could not start or did not succeed; one line: what, where, fix.
    """
    cluster = Cluster.connect(job.cluster.namespace)
    # A launcher outside the cluster may not have the volume; then there is no lease, as with kubectl apply.
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
        objects: the objects that the job needs, then the job, as rendered by `job_objects`.
        limits: only the time limits and the grace period are read.
        write: receives each line of worker 0's log, and the launcher's own lines, which begin with `launcher:`.
        on_leftover: called if the job may still run although it should have been stopped.

    Raises:
        LaunchError: as `run`. Nothing is left running then, unless `on_leftover` was called.
    """
    *needs, job = objects
    kind, name = kind_of(job), job["metadata"]["name"]
    _require_claims(cluster, pod_template(objects))
    current = _make_room(cluster, job, limits, write)
    ours = current is not None  # must be stopped if this launcher gives up
    with _stop_on_sigterm():
        try:
            if current is None:
                ours = True  # from here on: if the response is lost, the job may have been created
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
        except BaseException as error:  # also a signal, perhaps during the job's creation
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
    """The running job of this name; None if there is none and its pods are gone.

    A finished job is deleted even if it succeeded: it would not run again if its artefact still existed.
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
    """Create a job that no launcher follows, as with kubectl apply; a finished job of its name is deleted first.

    A former launcher's lease may still be on the volume, so the pods are told that nobody renews it.

    Raises:
        LaunchError: it is already running, or cannot be created.
    """
    objects = copy.deepcopy(list(objects))
    environment = state.container(pod_template(objects)).setdefault("env", [])
    if all(variable["name"] != UNWATCHED_VARIABLE for variable in environment):
        environment.append({"name": UNWATCHED_VARIABLE, "value": "1"})
    *needs, job = objects
    name = job["metadata"]["name"]
    _require_claims(cluster, pod_template(objects))
    if _make_room(cluster, job, limits, write) is not None:
        raise LaunchError(f"job {name} is already running in namespace '{cluster.namespace}'")
    _hand_over(cluster, needs, _create(cluster, job, needs, owner=None))
    write(f"created job {name} in namespace {cluster.namespace}")


def _create(cluster: Cluster, job: Object, needs: Sequence[Object], owner: Object | None) -> Object:
    job = {**job, "metadata": {**job["metadata"], **({"ownerReferences": [owner]} if owner else {})}}
    # Before the job: otherwise its pods would first fail to mount it.
    for need in needs:
        _replace(cluster, need)
    try:
        if kind_of(job) is not TRAINJOB:
            return _create_known(cluster, job)
        try:
            return _create_known(cluster, bounded([*needs, job]))
        except UnknownFields as error:
            if error.fields != [f"spec.{DEADLINE}"]:
                raise
            return _create_known(cluster, job)  # by Trainer 2.1
    except Refused as error:
        if error.status != HTTPStatus.CONFLICT:  # another launcher was faster and owns it
            for need in needs:
                cluster.delete(need["kind"], need["metadata"]["name"])
        fix, _ = fix_for(CREATION, str(error)) if "webhook" in str(error) else ("", False)
        if fix:
            raise Refused(error.status, f"{error}; {fix}") from None
        raise


def _hand_over(cluster: Cluster, needs: Sequence[Object], job: Object) -> None:
    """Make the job the owner of the objects it needs, so that they are garbage collected with it."""
    for need in needs:
        cluster.own(need["kind"], need["metadata"]["name"], _reference(job))


def _create_known(cluster: Cluster, body: Object) -> Object:
    """Create a job whose needs were created just before: the caches of Trainer and Kueue may not have them yet."""
    return _patiently(lambda: _create_once(cluster, body), _may_pass)


def _create_once(cluster: Cluster, body: Object) -> Object:
    """Create the object; on a retry it may exist already, because only the first response was lost."""
    try:
        return cluster.create(body)
    except ApiUnreachable:
        return cluster.get(body["kind"], body["metadata"]["name"]) or cluster.create(body)


def _replace(cluster: Cluster, need: Object) -> None:
    """Delete and recreate: a patched object could still belong to a deleted job and be collected with it."""
    for is_last in (False, True):
        cluster.delete(need["kind"], need["metadata"]["name"])
        try:
            # A runtime is gone only after its operator has noticed that no job refers to it.
            _patiently(
                lambda: cluster.create(need), lambda error: error.status == HTTPStatus.CONFLICT or _may_pass(error)
            )
            return
        except ApiUnreachable:  # perhaps only the response was lost
            if is_last:
                raise


def _may_pass(error: Refused) -> bool:
    return bool(NOT_YET.search(str(error)))


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
    """Take ownership: the launcher that created the job may be gone; it now belongs to this launcher and pipeline
    run."""
    labels, name = {PIPELINE_LABEL: job["metadata"]["labels"].get(PIPELINE_LABEL)}, current["metadata"]["name"]
    try:
        cluster.own(current["kind"], name, cluster.own_pod(), labels)
    except Refused as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        raise LaunchError(
            f"job {name} in namespace '{cluster.namespace}' is being deleted by someone else; start again"
        ) from None


def _reference(job: Object) -> Object:
    metadata = job["metadata"]
    return {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": metadata["name"], "uid": metadata["uid"]}


def _wait_until_gone(
    cluster: Cluster, kind: JobKind, name: str, grace_seconds: int, write: Callable[[str], None]
) -> None:
    """Wait for the predecessor's pods: a new job would wait for them without reporting it."""
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
    """Delete the job and wait for its pods, which save a checkpoint; returns whether all are gone.

    Raises nothing: the caller raises the error that led here.
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
    """Make SIGTERM end the block like Ctrl-C, so that it can clean up; the process then exits with 143."""
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
    """Ignore further signals during the block: cut short, it would leave the job running unwatched."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The volume claims that the pods of a run share, and the secrets for gated data, a judge and trackers."""

from __future__ import annotations

from collections.abc import Iterator

from components.cluster.look import Look
from manifests.clusterspec import StorageSpec
from manifests.kinds import Object
from manifests.objects import tracker_secret
from manifests.spec import JobSpec
from pipelines.doctor.findings import Finding
from trainer.recording.trackers.keys import TITLES, named
from trainer.trackerspec import KEYS

SHARED = "ReadWriteMany"
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def claims(look: Look, storage: StorageSpec, nodes: int) -> Iterator[Finding]:
    """Existence, binding and access mode of both claims; the command that creates one that is absent."""
    for name in (storage.datasets_pvc, storage.checkpoints_pvc):
        claim = look.in_namespace("persistentvolumeclaims", name)
        if claim is None:
            remedy = f"kubectl apply -n {look.namespace} -f manifests/base/storage.yaml"
            yield Finding(f"claim {name}", "no", f"does not exist{_class_hint(look)}", remedy)
            continue
        yield _claim(look, claim, nodes)


def _claim(look: Look, claim: Object, nodes: int) -> Finding:
    name, spec = claim["metadata"]["name"], claim["spec"]
    phase = claim.get("status", {}).get("phase", "Pending")
    modes = ", ".join(spec["accessModes"])
    size = claim.get("status", {}).get("capacity", {}).get("storage") or spec["resources"]["requests"]["storage"]
    detail = f"{phase}, {size}, {modes}, class {spec.get('storageClassName', '(none)')}"
    if phase != "Bound" and not _binds_late(look, spec.get("storageClassName")):
        return Finding(f"claim {name}", "no", detail, f"kubectl -n {look.namespace} describe pvc {name}")
    if SHARED not in spec["accessModes"]:
        remedy = (
            f"make the claim {SHARED} (NFS, CephFS, Filestore, FSx …): data steps and workers of all nodes share it"
        )
        return Finding(f"claim {name}", "no" if nodes > 1 else "missing", detail, remedy)
    return Finding(f"claim {name}", "ok", detail)


def secret(look: Look, name: str) -> Iterator[Finding]:
    found = look.in_namespace("secrets", name)
    if found and "token" in (found.get("data") or {}):
        yield Finding("secret", "ok", f"'{name}' has a token for gated datasets")
        return
    detail = f"'{name}' has no key 'token'" if found else f"no '{name}'; only gated datasets need it"
    remedy = f"kubectl -n {look.namespace} create secret generic {name} --from-file=token=FILE"
    yield Finding("secret", "missing", detail, remedy)


def judge_secret(look: Look, job: JobSpec | None) -> Iterator[Finding]:
    """The secret with the key of the judge's API, where the job has a judge that wants one."""
    judge = job.train.evaluate.judge if job else None
    if job is None or judge is None or judge.api_key_env is None:
        return
    name = job.cluster.judge_secret
    found = look.in_namespace("secrets", name)
    if found and "token" in (found.get("data") or {}):
        yield Finding("judge", "ok", f"'{name}' has a key for {judge.url}")
        return
    remedy = f"kubectl -n {look.namespace} create secret generic {name} --from-file=token=FILE"
    yield Finding("judge", "no", f"no secret '{name}' with a key 'token'; the evaluation needs it", remedy)


def tracker_secrets(look: Look, job: JobSpec | None) -> Iterator[Finding]:
    """The secrets with the keys of the trackers that the job names; a run does without, and so none is a "no"."""
    for name in job.train.trackers.names if job and job.train.trackers else ():
        assert job is not None
        secret = tracker_secret(job, name)
        found = look.in_namespace("secrets", secret)
        data = (found or {}).get("data") or {}
        if any(all(key in data for key in complete) for complete in KEYS[name]):
            yield Finding("tracker", "ok", f"'{secret}' has the key for {TITLES[name]}")
            continue
        lacking = f"'{secret}' has no {named(name)}" if found else f"no '{secret}'"
        without = {
            "wandb": "runs are recorded offline, in their directories",
            "mlflow": "only a server without access control takes runs",
            "langfuse": "runs go on without it",
        }[name]
        files = " ".join(f"--from-file={key}=FILE" for key in KEYS[name][-1])
        remedy = f"kubectl -n {look.namespace} create secret generic {secret} {files}"
        yield Finding("tracker", "missing", f"{lacking}; {TITLES[name]}: {without}", remedy)


def _binds_late(look: Look, name: str | None) -> bool:
    found = look.get(f"/apis/storage.k8s.io/v1/storageclasses/{name}") if name else None
    return (found or {}).get("volumeBindingMode") == "WaitForFirstConsumer"


def _class_hint(look: Look) -> str:
    classes = look.items("/apis/storage.k8s.io/v1/storageclasses")
    annotated = [(c["metadata"]["name"], c["metadata"].get("annotations", {}).get(DEFAULT_CLASS)) for c in classes]
    default = next((name for name, is_default in annotated if is_default == "true"), None)
    if default:
        return f"; the default storage class is {default}, which has to offer {SHARED}"
    names = ", ".join(name for name, _ in annotated) or "none at all"
    return f"; there is no default storage class ({names}), so the claim has to name one"

"""The end of a job: restarts, exit codes, deadlines, cleanup and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.kinds import QUEUE_LABEL
from manifests.lint.registry import Hit, Severity, rule
from manifests.lint.subjects import Pod, PyTorchJob, TrainJob

ERROR, WARNING = Severity.ERROR, Severity.WARNING
RESTART_POLICIES = ("Always", "OnFailure", "Never", "ExitCode")
CLEAN_POD_POLICIES = ("Running", "All", "None")
SHORTEST_GRACE_SECONDS = 60
SHORTEST_TTL_SECONDS = 60
KEEPS = ("persistentVolumeClaim", "nfs", "csi", "hostPath", "ephemeral", "cephfs", "fc", "iscsi")


@rule(
    "restart-policy-unknown",
    ERROR,
    PyTorchJob,
    why="Any text is accepted and then copied into the pods, which the API server refuses: a job without pods or "
    "status.",
    fix=f"One of {', '.join(RESTART_POLICIES)}, spelled so.",
)
def restart_policy_unknown(job: PyTorchJob) -> Iterator[Hit]:
    for role in job.roles:
        if role["restartPolicy"] and role["restartPolicy"].value not in RESTART_POLICIES:
            yield Hit(role["restartPolicy"], f"restartPolicy '{role['restartPolicy'].value}'")


@rule(
    "restart-always",
    ERROR,
    PyTorchJob,
    why="Always restarts a container that has exited 0 too: the finished training starts again, and the job never "
    "succeeds.",
    fix="Use ExitCode with exit codes that distinguish retryable failures, or OnFailure with backoffLimit.",
)
def restart_always(job: PyTorchJob) -> Iterator[Hit]:
    for role in job.roles:
        if role["restartPolicy"].text == "Always":
            yield Hit(role["restartPolicy"], "restartPolicy Always")


@rule(
    "restart-unbounded",
    WARNING,
    PyTorchJob,
    why="OnFailure, the default, without backoffLimit restarts a failing container forever, on the same node even if "
    "that node is the fault.",
    fix="Write runPolicy.backoffLimit, or restartPolicy: ExitCode and a budget in the training process.",
)
def restart_unbounded(job: PyTorchJob) -> Iterator[Hit]:
    for role in job.roles:
        if (role["restartPolicy"].text or "OnFailure") == "OnFailure" and not job.run_policy["backoffLimit"]:
            written = "" if role["restartPolicy"] else " (by default)"
            yield Hit(role["restartPolicy"], f"restartPolicy OnFailure{written} without backoffLimit")


@rule(
    "exitcode-backoff-limit",
    WARNING,
    PyTorchJob,
    why="Under ExitCode the pod is deleted and recreated, so no restarts are counted and backoffLimit is ignored. "
    "A limit of 2 gave 32 restarts in 4.7 minutes; exit 137, out of memory, counts as retryable.",
    fix="Keep the count in the training process, on its volume, and exit below 128 when it is spent; remove "
    "backoffLimit.",
)
def exitcode_backoff_limit(job: PyTorchJob) -> Iterator[Hit]:
    limit = job.run_policy["backoffLimit"]
    if (limit.number or 0) > 0 and any(role["restartPolicy"].text == "ExitCode" for role in job.roles):
        yield Hit(limit, f"backoffLimit {limit.value} under restartPolicy ExitCode")


@rule(
    "exitcode-torchrun",
    WARNING,
    Pod,
    why="torchrun turns every failure of a process into its own exit code 1, and ExitCode treats 1 to 127 as "
    "permanent: a lost connection or a preempted rank ends the job like a bug.",
    fix="Start torchrun from an entrypoint that turns the ranks' exit codes into its own (128 and above: retryable).",
)
def exitcode_torchrun(pod: Pod) -> Iterator[Hit]:
    if pod.restart_policy == "ExitCode" and _by_torchrun(pod):
        yield Hit(pod.launches[0].place, f"{pod.launches[0].launcher} itself under restartPolicy ExitCode")


@rule(
    "spot-never",
    WARNING,
    Pod,
    why="The job runs on spot nodes, which may be taken away at any time, and Never ends it with the first lost pod.",
    fix="Use restartPolicy: ExitCode and exit 143 on SIGTERM once the checkpoint is saved.",
)
def spot_never(pod: Pod) -> Iterator[Hit]:
    if pod.restart_policy == "Never" and (spot := _spot(pod)):
        yield Hit(pod.spec, f"restartPolicy Never on nodes of '{spot}'")


@rule(
    "clean-pod-policy",
    ERROR,
    PyTorchJob,
    why="With None, the default, the other workers run on after one has failed or has finished, and keep their GPUs: "
    "4.5 minutes later they still did.",
    fix="Write runPolicy.cleanPodPolicy: Running.",
)
def clean_pod_policy(job: PyTorchJob) -> Iterator[Hit]:
    policy = job.run_policy["cleanPodPolicy"]
    if job.pod_count > 1 and (not policy or policy.text == "None"):
        yield Hit(policy, f"cleanPodPolicy {'None' if policy else 'is None by default'}, {job.pod_count} pods")


@rule(
    "clean-pod-policy-unknown",
    ERROR,
    PyTorchJob,
    why="Any text is accepted; one that the operator does not know cleans nothing up.",
    fix=f"One of {', '.join(CLEAN_POD_POLICIES)}, spelled so.",
)
def clean_pod_policy_unknown(job: PyTorchJob) -> Iterator[Hit]:
    policy = job.run_policy["cleanPodPolicy"]
    if policy and policy.value not in CLEAN_POD_POLICIES:
        yield Hit(policy, f"cleanPodPolicy '{policy.value}'")


@rule(
    "clean-pod-policy-all",
    WARNING,
    PyTorchJob,
    why="All deletes the finished pods too, and with them the only copy of their logs and termination messages.",
    fix="Write Running; ttlSecondsAfterFinished removes the rest later.",
)
def clean_pod_policy_all(job: PyTorchJob) -> Iterator[Hit]:
    if job.run_policy["cleanPodPolicy"].text == "All":
        yield Hit(job.run_policy["cleanPodPolicy"], "cleanPodPolicy All")


@rule(
    "no-deadline",
    WARNING,
    PyTorchJob,
    why="Nothing ends a job that hangs. activeDeadlineSeconds is not enough: the operator checks it only when a "
    "pod or the job changes (a deadline of 15 s was still not kept at 276 s), so the process needs one of "
    "its own.",
    fix="Write runPolicy.activeDeadlineSeconds, and let the entrypoint enforce a deadline itself.",
)
def no_deadline(job: PyTorchJob) -> Iterator[Hit]:
    if not job.run_policy["activeDeadlineSeconds"]:
        yield Hit(job.run_policy["activeDeadlineSeconds"], "no activeDeadlineSeconds")


@rule(
    "no-ttl",
    WARNING,
    PyTorchJob,
    why="Finished jobs and their pods stay until someone deletes them. (A job that ended by a permanent exit "
    "code under ExitCode has no completion time, so that its TTL never runs out: delete that one yourself.)",
    fix="Write runPolicy.ttlSecondsAfterFinished, a day for instance.",
)
def no_ttl(job: PyTorchJob) -> Iterator[Hit]:
    if not job.run_policy["ttlSecondsAfterFinished"]:
        yield Hit(job.run_policy["ttlSecondsAfterFinished"], "no ttlSecondsAfterFinished")


@rule(
    "ttl-short",
    WARNING,
    PyTorchJob,
    why="The job, its status and its pods' logs are gone before a launcher or a person that looks now and then "
    "has seen how it ended; a client that waits for it then waits for nothing.",
    fix="Give it an hour or more.",
)
def ttl_short(job: PyTorchJob) -> Iterator[Hit]:
    ttl = job.run_policy["ttlSecondsAfterFinished"]
    if ttl.number is not None and 0 <= ttl.number < SHORTEST_TTL_SECONDS:
        yield Hit(ttl, f"ttlSecondsAfterFinished {ttl.number}")


@rule(
    "negative-number",
    ERROR,
    PyTorchJob,
    why="Negative and zero limits are accepted: with backoffLimit below 0 or a deadline of 0 the job fails as it "
    "starts, with a negative TTL it is deleted as it ends; a worker with replicas below 1 is denied.",
    fix="Write a positive number, or leave the field out.",
)
def negative_number(job: PyTorchJob) -> Iterator[Hit]:
    least = {"backoffLimit": 0, "ttlSecondsAfterFinished": 0, "activeDeadlineSeconds": 1}
    for name, minimum in least.items():
        place = job.run_policy[name]
        if place.number is not None and place.number < minimum:
            yield Hit(place, f"{name} {place.number}")
    if job.worker and job.replicas(job.worker) < 1:
        yield Hit(job.worker["replicas"], f"replicas {job.replicas(job.worker)}")


@rule(
    "suspended",
    WARNING,
    PyTorchJob,
    why="The job is created suspended and names no queue whose controller would resume it: it waits forever, "
    "which looks like a full cluster.",
    fix=f"Name a queue in the label {QUEUE_LABEL}, or remove suspend.",
)
def suspended(job: PyTorchJob) -> Iterator[Hit]:
    if job.run_policy["suspend"].value is True and not job.place["metadata"]["labels"][QUEUE_LABEL]:
        yield Hit(job.run_policy["suspend"], "suspend without a queue")


@rule(
    "trainjob-suspended",
    WARNING,
    TrainJob,
    why="The job is created suspended and names no queue whose controller would resume it: it waits forever, "
    "which looks like a full cluster.",
    fix=f"Name a queue in the label {QUEUE_LABEL}, or remove suspend.",
)
def trainjob_suspended(job: TrainJob) -> Iterator[Hit]:
    if job.spec["suspend"].value is True and not job.place["metadata"]["labels"][QUEUE_LABEL]:
        yield Hit(job.spec["suspend"], "suspend without a queue")


@rule(
    "managed-by",
    ERROR,
    PyTorchJob,
    why="The webhook denies any other manager.",
    fix="Leave managedBy out, or write kubeflow.org/training-operator or kueue.x-k8s.io/multikueue.",
)
def managed_by(job: PyTorchJob) -> Iterator[Hit]:
    place = job.run_policy["managedBy"]
    if place and place.text not in ("kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue"):
        yield Hit(place, f"managedBy '{place.value}'")


@rule(
    "pod-restart-policy",
    WARNING,
    PyTorchJob,
    why="The operator overwrites the pod template's restartPolicy with the one of the replica type.",
    fix="Write restartPolicy beside replicas, and not in the template.",
)
def pod_restart_policy(job: PyTorchJob) -> Iterator[Hit]:
    for role in job.roles:
        place = role["template"]["spec"]["restartPolicy"]
        if place:
            yield Hit(place, f"restartPolicy {place.value} in the pod template")


@rule(
    "grace-period",
    WARNING,
    Pod,
    why="A pod that is deleted or preempted gets SIGTERM and, 30 seconds later unless written, SIGKILL: too short "
    "to save the checkpoint of a model of billions of parameters.",
    fix="Write terminationGracePeriodSeconds of twice what a checkpoint takes, and let PID 1 pass SIGTERM on.",
)
def grace_period(pod: Pod) -> Iterator[Hit]:
    place = pod.spec["terminationGracePeriodSeconds"]
    seconds = 30 if place.number is None else place.number
    # Spot nodes stop 15 to 120 s after their notice, whatever grace period is requested.
    if pod.main and pod.accelerators and 0 <= seconds < SHORTEST_GRACE_SECONDS and not _spot(pod):
        yield Hit(place, f"{seconds} s of grace{'' if place else ' by default'} for a pod with GPUs")


@rule(
    "nothing-kept",
    WARNING,
    Pod,
    why="Pods restart, but no volume outlives them: unless the checkpoints go to an object store, every restart "
    "begins at step 0, in the pod's own file system.",
    fix="Mount a claim that all workers share (ReadWriteMany) and write checkpoints there.",
)
def nothing_kept(pod: Pod) -> Iterator[Hit]:
    if pod.main and pod.accelerators and pod.restart_policy in ("OnFailure", "ExitCode"):
        volumes = list(pod.spec["volumes"].each())
        if not any(kind in volume for volume in volumes for kind in KEEPS):
            yield Hit(pod.spec["volumes"], "no volume outlives the pod")


def _by_torchrun(pod: Pod) -> bool:
    return any(launch.launcher != "python" for launch in pod.launches)


def _spot(pod: Pod) -> str | None:
    """The node selector or toleration by which a pod selects spot nodes."""
    words = [f"{key} {value.value}" for key, value in pod.spec["nodeSelector"].fields()]
    words += [f"{entry['key'].text} {entry['value'].text}".strip() for entry in pod.spec["tolerations"].each()]
    return next((word for word in words if any(name in word.lower() for name in ("spot", "preemptible"))), None)

"""Field names that the APIs know: PyTorchJob v1 of the training operator 1.9, TrainJob of Kubeflow Trainer 2.0 to 2.3.

An end-to-end test compares them with the schemas of a cluster.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


JOB = _names("elasticPolicy nprocPerNode pytorchReplicaSpecs runPolicy")
RUN_POLICY = _names(
    "activeDeadlineSeconds backoffLimit cleanPodPolicy managedBy schedulingPolicy suspend ttlSecondsAfterFinished"
)
SCHEDULING = _names("minAvailable minResources priorityClass queue scheduleTimeoutSeconds")
ELASTIC = _names(
    "maxReplicas maxRestarts metrics minReplicas nProcPerNode rdzvBackend rdzvConf rdzvHost rdzvId rdzvPort standalone"
)
REPLICA = _names("replicas restartPolicy template")
POD = _names(
    "activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig dnsPolicy enableServiceLinks "
    "ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname imagePullSecrets initContainers "
    "nodeName nodeSelector os overhead preemptionPolicy priority priorityClassName readinessGates resourceClaims "
    "restartPolicy runtimeClassName schedulerName schedulingGates securityContext serviceAccount serviceAccountName "
    "setHostnameAsFQDN shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations "
    "topologySpreadConstraints volumes"
)
CONTAINER = _names(
    "args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports readinessProbe resizePolicy "
    "resources restartPolicy securityContext startupProbe stdin stdinOnce terminationMessagePath "
    "terminationMessagePolicy tty volumeDevices volumeMounts workingDir"
)
# Of JobSet's pods beside (0.10, Kubernetes 1.34).
NEWER_POD = _names("hostnameOverride resources")
NEWER_CONTAINER = _names("restartPolicyRules")
TRAINER = _names("args command env image numNodes numProcPerNode resourcesPerNode")
TRAINJOB = _names("initializer managedBy runtimeRef suspend trainer")
# Read from pkg/apis/trainer/v1alpha1/trainjob_types.go of each release.
_BY_VERSION = {
    "2.0": {"annotations", "labels", "podSpecOverrides"},
    "2.1": {"annotations", "labels", "podTemplateOverrides"},
    "2.2": {"activeDeadlineSeconds", "runtimePatches"},
    "2.3": {"activeDeadlineSeconds", "runtimePatches"},
}
# Fields that are whole numbers, by where they are; `*` stands for each entry of a list or mapping.
NUMBERS = {
    "spec": _names("activeDeadlineSeconds"),  # of a TrainJob, from 2.2
    "spec.runPolicy": _names("activeDeadlineSeconds backoffLimit ttlSecondsAfterFinished"),
    "spec.runPolicy.schedulingPolicy": _names("minAvailable scheduleTimeoutSeconds"),
    "spec.elasticPolicy": _names("maxReplicas maxRestarts minReplicas nProcPerNode rdzvPort"),
    "spec.pytorchReplicaSpecs.*": _names("replicas"),
    "spec.trainer": _names("numNodes"),
    "spec.mlPolicy": _names("numNodes"),
    "spec.mlPolicy.torch.elasticPolicy": _names("maxNodes maxRestarts minNodes"),
    "spec.template.spec": _names("ttlSecondsAfterFinished"),
    "spec.template.spec.failurePolicy": _names("maxRestarts"),
    "spec.template.spec.replicatedJobs.*": _names("replicas"),
    "spec.template.spec.replicatedJobs.*.template.spec": _names(
        "activeDeadlineSeconds backoffLimit backoffLimitPerIndex completions maxFailedIndexes parallelism "
        "ttlSecondsAfterFinished"
    ),
}
POD_NUMBERS = {
    "spec": _names("activeDeadlineSeconds priority terminationGracePeriodSeconds"),
    "spec.securityContext": _names("fsGroup runAsGroup runAsUser"),
    "spec.tolerations.*": _names("tolerationSeconds"),
    "spec.initContainers.*.securityContext": _names("runAsGroup runAsUser"),
    "spec.containers.*.securityContext": _names("runAsGroup runAsUser"),
    "spec.containers.*.ports.*": _names("containerPort hostPort"),
}
TRAINER_VERSIONS = tuple(_BY_VERSION)


def trainjob_fields(version: str) -> frozenset[str]:
    """Fields of a TrainJob's spec."""
    return TRAINJOB | _BY_VERSION[version]

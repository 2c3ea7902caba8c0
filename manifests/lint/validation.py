"""What Kubernetes rejects beyond its schemas: values, ranges, unions and names that only its code checks.

Keys are objects and fields of the tables of `fields`, without variant numbers.
"""

from __future__ import annotations

import re

# Strings with a fixed set of values; an empty one means the default. Others have theirs in the tables.
WORDS = {
    "Container.restartPolicy": "Always OnFailure Never",
    "HPAScalingPolicy.type": "Pods Percent",
    "HPAScalingRules.selectPolicy": "Max Min Disabled",
    "LabelSelectorRequirement.operator": "In NotIn Exists DoesNotExist",
    "MetricTarget.type": "Utilization Value AverageValue",
    "PodFailurePolicyOnPodConditionsPattern.status": "True False Unknown",
    "PodOS.name": "linux windows",
    "RoleRef.apiGroup": "rbac.authorization.k8s.io",
    "RoleRef.kind": "Role ClusterRole",
    "StatefulSetPersistentVolumeClaimRetentionPolicy.whenDeleted": "Retain Delete",
    "StatefulSetPersistentVolumeClaimRetentionPolicy.whenScaled": "Retain Delete",
    "Subject.kind": "ServiceAccount User Group",
}
_PORT, _ID, _MODE = (1, 65535), (0, 2**31 - 1), (0, 0o777)
RANGES = {
    "ContainerPort.containerPort": _PORT,
    "ContainerPort.hostPort": (0, 65535),
    "CronJobSpec.failedJobsHistoryLimit": _ID,
    "CronJobSpec.startingDeadlineSeconds": (0, 2**63 - 1),
    "CronJobSpec.successfulJobsHistoryLimit": _ID,
    "ElasticPolicy.rdzvPort": _PORT,
    "HTTPGetAction.port": _PORT,
    "JobSpec.backoffLimit": _ID,
    "JobSpec.completions": _ID,
    "JobSpec.parallelism": _ID,
    "JobSpec.ttlSecondsAfterFinished": _ID,
    "NetworkPolicyPort.port": _PORT,
    "PodSecurityContext.fsGroup": _ID,
    "PodSecurityContext.runAsGroup": _ID,
    "PodSecurityContext.runAsUser": _ID,
    "PodSpec.activeDeadlineSeconds": (1, 2**31 - 1),
    "PodSpec.terminationGracePeriodSeconds": (0, 2**63 - 1),
    "PreferredSchedulingTerm.weight": (1, 100),
    "SecurityContext.runAsGroup": _ID,
    "SecurityContext.runAsUser": _ID,
    "ServicePort.port": _PORT,
    "ServicePort.nodePort": (0, 65535),
    "ServicePort.targetPort": _PORT,
    "TCPSocketAction.port": _PORT,
    "TopologySpreadConstraint.maxSkew": (1, 2**31 - 1),
    "WeightedPodAffinityTerm.weight": (1, 100),
    **{f"{kind}Spec.replicas": _ID for kind in ("Deployment", "ReplicaSet", "StatefulSet")},
    **{f"{kind}VolumeSource.defaultMode": _MODE for kind in ("ConfigMap", "DownwardAPI", "Projected", "Secret")},
}
# In Kubernetes' own kinds: fields required by the code but not the schema, and fields with a default.
NEEDED = {
    *(f"{kind}.spec" for kind in ("CronJob", "DaemonSet", "Deployment", "Job", "PersistentVolumeClaim", "Pod")),
    *("PodTemplateSpec.spec", "ReplicaSet.spec", "Service.spec", "StatefulSet.spec"),
    *("Container.image", "PersistentVolumeClaimSpec.accessModes", "PersistentVolumeClaimSpec.resources"),
}
NOT_NEEDED = {
    *("LimitRangeSpec.limits", "PodFailurePolicy.rules", "PodFailurePolicyOnPodConditionsPattern.status"),
    *("PriorityClass.value", "RoleRef.apiGroup"),
}
TWICE = {  # lists whose keys may repeat, or are covered by duplicate-env
    *("Container.env", "EphemeralContainer.env", "InitContainer.env", "Trainer.env"),
    *("Container.ports", "PodSpec.hostAliases", "PodSpec.imagePullSecrets"),
    *("ServiceAccount.imagePullSecrets", "ServiceAccount.secrets"),
}
NOT_EMPTY = ("PersistentVolumeClaimSpec.accessModes", "PodSpec.containers")
# Unions: exactly one of several fields; "?" if none is allowed too.
_HANDLERS = "exec grpc httpGet tcpSocket sleep"
ONE_OF = {
    "EnvFromSource": "configMapRef secretRef",
    "EnvVar": "value valueFrom ?",
    "EnvVarSource": "configMapKeyRef fieldRef fileKeyRef resourceFieldRef secretKeyRef",
    "LifecycleHandler": _HANDLERS,
    "Probe": _HANDLERS,
    "Volume": "*",
    "VolumeProjection": "*",
}
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_OF_LABEL, _OF_DOMAIN = "lower-case letters, digits and -", "lower-case letters, digits, - and ."
NAMES = {
    "Container.name": (_LABEL, 63, _OF_LABEL),
    "ContainerPort.name": (r"(?=.*[a-z])[a-z0-9](-?[a-z0-9])*|", 2**31, _OF_LABEL),
    "CronJobSpec.schedule": (r"@[a-z]+( \S+)?|(\S+\s+){4}\S+", 2**31, "five fields"),
    "EmptyDirVolumeSource.medium": (r"Memory|HugePages(-.+)?|", 2**31, "Memory or HugePages"),
    "EnvVar.name": (r"[ -<>-~]+", 2**31, "printable ASCII without ="),
    "PersistentVolumeClaimVolumeSource.claimName": (DOMAIN, 253, _OF_DOMAIN),
    **dict.fromkeys(
        ("HTTPGetAction.port", "NetworkPolicyPort.port", "ServicePort.targetPort", "TCPSocketAction.port"),
        (r"(?=.*[a-z])[a-z0-9](-?[a-z0-9]){0,14}", 2**31, "letters of a port's name, nor a number without quotes"),
    ),
    **dict.fromkeys(
        (
            *("PodDisruptionBudgetSpec.maxUnavailable", "PodDisruptionBudgetSpec.minAvailable"),
            *("RollingUpdateDeployment.maxSurge", "RollingUpdateDeployment.maxUnavailable"),
        ),
        (r"[0-9]+%", 2**31, "a number and %, or a number without quotes"),
    ),
    "ReplicatedJob.name": (_LABEL, 63, _OF_LABEL),
    "Torch.numProcPerNode": (r"auto|cpu|gpu|[1-9][0-9]*", 2**31, "auto, cpu, gpu or digits"),
    "Volume.name": (_LABEL, 63, _OF_LABEL),
}
# Names of objects, by kind; other kinds use DNS subdomains, those of RBAC anything.
_LETTER_FIRST = r"[a-z]([-a-z0-9]*[a-z0-9])?"
OBJECT_NAMES = {
    "CronJob": (DOMAIN, 52, _OF_DOMAIN),
    **dict.fromkeys(("Job", "Namespace", "StatefulSet"), (_LABEL, 63, _OF_LABEL)),
    "Service": (_LETTER_FIRST, 63, f"{_OF_LABEL}, a letter first"),
    "TrainJob": (_LETTER_FIRST, 2**31, f"{_OF_LABEL}, a letter first"),  # trainjob-name checks the length
}
OTHER_NAMES = DOMAIN, 253, _OF_DOMAIN
FREELY_NAMED = ("ClusterRole", "ClusterRoleBinding", "IPAddress", "PyTorchJob", "Role", "RoleBinding")
WITHOUT_NAME = ("Review",)  # suffixes of kinds that are requests to the API server
LABEL_KEY = re.compile(rf"({DOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
DATA_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
LABELS = ("ObjectMeta.labels", "PodSpec.nodeSelector", "LabelSelector.matchLabels", "ServiceSpec.selector")
DATA = ("ConfigMap.data", "ConfigMap.binaryData", "Secret.data", "Secret.stringData")
RESOURCES = ("LimitRangeItem.", "ResourceRequirements.", "VolumeResourceRequirements.")
RESOURCE = re.compile(rf"cpu|memory|ephemeral-storage|storage|hugepages-.+|{DOMAIN}/{LABEL_KEY.pattern}")
GPUS = ("nvidia.com/gpu", "amd.com/gpu")
VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?|\{\{.*\}\}|<[A-Za-z][\w -]*>")  # of envsubst, Helm or manual templates
TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
# Fields renamed between releases of Trainer.
RENAMED = {
    "podTemplateOverrides": "2.2 replaced it by runtimePatches",
    "podSpecOverrides": "2.1 replaced it by podTemplateOverrides, 2.2 by runtimePatches",
    "runtimePatches": "from 2.2; before, podTemplateOverrides",
    "activeDeadlineSeconds": "from 2.2; before, in the spec of the runtime's Job",
    "labels": "2.2 removed it; write them in runtimePatches",
    "annotations": "2.2 removed it; write them in runtimePatches",
    "numProcPerNode": "2.2 removed it; write it in the TrainJob's trainer",
}
# Fields whose mistakes have their own rule.
TOLD = {
    "PyTorchJobSpec.pytorchReplicaSpecs",  # replica-types
    "RuntimeRef.name", "TrainJobSpec.runtimeRef",  # trainjob-runtime-ref
}  # fmt: skip

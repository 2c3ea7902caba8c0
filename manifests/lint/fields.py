"""The fields that the APIs know: PyTorchJob v1 of the training operator 1.9, Kubeflow Trainer 2.0 to 2.3 with JobSet.

In the notation of podschema.json, which has the objects inside pods and batch jobs. An end-to-end test compares the
names with the schemas of a cluster.
"""

from __future__ import annotations

from manifests.lint.podschema import Table, table

TRAINER_VERSIONS = ("2.0", "2.1", "2.2", "2.3")


def _fields(text: str) -> dict[str, str]:
    """`name: type, name: type`; both lists and mappings have their own brackets, so that commas only part fields."""
    return {name.strip(): kind.strip() for name, _, kind in (part.partition(":") for part in text.split(","))}


def _object(spec: str) -> dict[str, str]:
    return _fields(f"apiVersion: string, kind: string, metadata: ObjectMeta, spec: {spec}!, status: any")


_OWN: Table = {
    "PyTorchJob": _object("PyTorchJobSpec"),
    "PyTorchJobSpec": _fields(
        "elasticPolicy: ElasticPolicy, nprocPerNode: string, pytorchReplicaSpecs: {ReplicaSpec}, runPolicy: RunPolicy"
    ),
    "RunPolicy": _fields(
        "activeDeadlineSeconds: integer, backoffLimit: integer, cleanPodPolicy: string, managedBy: string, "
        "schedulingPolicy: SchedulingPolicy, suspend: boolean, ttlSecondsAfterFinished: integer"
    ),
    "SchedulingPolicy": _fields(
        "minAvailable: integer, minResources: {quantity}, priorityClass: string, queue: string, "
        "scheduleTimeoutSeconds: integer"
    ),
    "ElasticPolicy": _fields(
        "maxReplicas: integer, maxRestarts: integer, metrics: [any], minReplicas: integer, nProcPerNode: integer, "
        "rdzvBackend: string, rdzvConf: [RdzvConf], rdzvHost: string, rdzvId: string, rdzvPort: integer, "
        "standalone: boolean"
    ),
    "RdzvConf": _fields("key: string, value: string"),
    "ReplicaSpec": _fields("replicas: integer, restartPolicy: string, template: PodTemplateSpec"),
    "TrainJob": _object("TrainJobSpec"),
    "TrainJobSpec": _fields(
        "initializer: Initializer, managedBy: string, runtimeRef: RuntimeRef, suspend: boolean, trainer: Trainer"
    ),
    "RuntimeRef": _fields("apiGroup: string, kind: string, name: string"),
    "Initializer": _fields("dataset: InitializerStep, model: InitializerStep"),
    "InitializerStep": _fields("env: [EnvVar name], secretRef: LocalObjectReference, storageUri: string"),
    "Trainer": _fields(
        "args: [string], command: [string], env: [EnvVar name], image: string, numNodes: integer, "
        "numProcPerNode: int-or-string, resourcesPerNode: ResourceRequirements"
    ),
    "PodTemplateOverride": _fields("metadata: ObjectMeta, spec: PodSpecOverride, targetJobs: [TargetJob]!"),
    "TargetJob": _fields("name: string!"),
    "PodSpecOverride": _fields(
        "affinity: Affinity, containers: [ContainerOverride name], imagePullSecrets: [LocalObjectReference name], "
        "initContainers: [ContainerOverride name], nodeSelector: {string}, schedulingGates: [PodSchedulingGate name], "
        "serviceAccountName: string, tolerations: [Toleration], volumes: [Volume name]"
    ),
    "ContainerOverride": _fields("env: [EnvVar name], name: string!, volumeMounts: [VolumeMount mountPath]"),
    "RuntimePatch": _fields("manager: string!, time: string, trainingRuntimeSpec: RuntimeSpecPatch"),
    "RuntimeSpecPatch": _fields("template: JobSetTemplatePatch"),
    "JobSetTemplatePatch": _fields("metadata: ObjectMeta, spec: JobSetSpecPatch"),
    "JobSetSpecPatch": _fields("replicatedJobs: [ReplicatedJobPatch name]"),
    "ReplicatedJobPatch": _fields("name: string!, template: JobTemplatePatch"),
    "JobTemplatePatch": _fields("metadata: ObjectMeta, spec: JobSpecPatch"),
    "JobSpecPatch": _fields("template: PodTemplatePatch"),
    "PodTemplatePatch": _fields("metadata: ObjectMeta, spec: PodSpecPatch"),
    "Runtime": _fields("apiVersion: string, kind: string, metadata: ObjectMeta, spec: RuntimeSpec!"),
    "RuntimeSpec": _fields("mlPolicy: MLPolicy, podGroupPolicy: PodGroupPolicy, template: JobSetTemplate!"),
    "MLPolicy": _fields("mpi: MPIPolicy, numNodes: integer, torch: TorchPolicy"),
    "MPIPolicy": _fields(
        "mpiImplementation: string, numProcPerNode: integer, runLauncherAsNode: boolean, sshAuthMountPath: string"
    ),
    "PodGroupPolicy": _fields("coscheduling: Coscheduling, volcano: any"),
    "Coscheduling": _fields("scheduleTimeoutSeconds: integer"),
    "JobSetTemplate": _fields("metadata: ObjectMeta, spec: JobSetSpec"),
    "JobSetSpec": _fields(
        "coordinator: any, failurePolicy: FailurePolicy, managedBy: string, network: Network, "
        "replicatedJobs: [ReplicatedJob name], startupPolicy: StartupPolicy, successPolicy: JobSetSuccessPolicy, "
        "suspend: boolean, ttlSecondsAfterFinished: integer"
    ),
    "Network": _fields("enableDNSHostnames: boolean, publishNotReadyAddresses: boolean, subdomain: string"),
    "FailurePolicy": _fields("maxRestarts: integer, restartStrategy: string, rules: [FailurePolicyRule]"),
    "FailurePolicyRule": _fields(
        "action: string!, name: string!, onJobFailureMessagePatterns: [string], onJobFailureReasons: [string], "
        "targetReplicatedJobs: [string]"
    ),
    "StartupPolicy": _fields("startupPolicyOrder: string!"),
    "JobSetSuccessPolicy": _fields("operator: string!, targetReplicatedJobs: [string]"),
    "ReplicatedJob": _fields(
        "dependsOn: [DependsOn name], groupName: string, name: string!, replicas: integer, template: JobTemplateSpec!"
    ),
    "DependsOn": _fields("name: string!, status: string!"),
    "ClaimTemplate": table()["PersistentVolumeClaimTemplate"]
    | _fields("apiVersion: string, kind: string, status: any"),
    "VolumeClaimPolicy": _fields("retentionPolicy: any, templates: [ClaimTemplate]"),
}
# What each release of Trainer has beside, read from its pkg/apis/trainer/v1alpha1.
_OLD_POLICY = {
    "TorchPolicy": _fields("elasticPolicy: TorchElasticPolicy, numProcPerNode: int-or-string"),
    "TorchElasticPolicy": _fields("maxNodes: integer, maxRestarts: integer, metrics: [any], minNodes: integer"),
}
_PATCH = {
    "PodSpecPatch": _OWN["PodSpecOverride"] | _fields("securityContext: PodSecurityContext"),
    "ContainerPatch": _OWN["ContainerOverride"] | _fields("securityContext: SecurityContext"),
}
_PATCH["PodSpecPatch"] |= _fields("containers: [ContainerPatch name], initContainers: [ContainerPatch name]")
_NEW_POLICY = {"MLPolicy": _OWN["MLPolicy"] | _fields("flux: any, jax: any, xgboost: any")}
_NEW_JOB = _fields("activeDeadlineSeconds: integer, runtimePatches: [RuntimePatch manager]")
_CLAIMS = {"JobSetSpec": _OWN["JobSetSpec"] | _fields("volumeClaimPolicies: [VolumeClaimPolicy]")}
_OF_RELEASE: dict[str, Table] = {
    "2.0": _OLD_POLICY
    | {
        "TrainJobSpec": _fields("annotations: {string}, labels: {string}, podSpecOverrides: [OldOverride]"),
        "OldOverride": _fields(
            "containers: [ContainerOverride name], initContainers: [ContainerOverride name], nodeSelector: {string}, "
            "schedulingGates: [PodSchedulingGate name], "
            "serviceAccountName: string, targetJobs: [TargetJob]!, tolerations: [Toleration], volumes: [Volume name]"
        ),
    },
    "2.1": _OLD_POLICY
    | {"TrainJobSpec": _fields("annotations: {string}, labels: {string}, podTemplateOverrides: [PodTemplateOverride]")},
    "2.2": _NEW_POLICY | _CLAIMS | _PATCH | {"TrainJobSpec": _NEW_JOB, "TorchPolicy": {}},
    "2.3": _NEW_POLICY | _CLAIMS | _PATCH | {"TrainJobSpec": _NEW_JOB, "TorchPolicy": _fields("envInjection: any")},
}
# Built with Kubernetes 1.35 and 1.36.
_OF_RELEASE["2.2"]["PodSpec"] = table()["PodSpec"] | _fields("workloadRef: any^")
_OF_RELEASE["2.3"]["PodSpec"] = table()["PodSpec"] | _fields("schedulingGroup: any^")
_OF_RELEASE["2.3"]["PodSpecPatch"] = _PATCH["PodSpecPatch"] | _fields("terminationGracePeriodSeconds: integer")
for _new in ("2.2", "2.3"):
    _OF_RELEASE[_new]["Trainer"] = _OWN["Trainer"] | _fields("numProcPerNode: integer")


def known(version: str) -> Table:
    """Object → field → type, with Kubeflow Trainer of `version`."""
    release = _OF_RELEASE[version]
    job = {"TrainJobSpec": _OWN["TrainJobSpec"] | release["TrainJobSpec"]}
    return {**table(), **_OWN, **release, **job}

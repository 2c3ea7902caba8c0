"""Manifests without findings, and how the cases of the linter's rules change them."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from manifests.lint.check import Result

Object = dict[str, Any]
Case = tuple[tuple[str, Any], ...]  # changes, all of which together break a rule

# The structure of the first example in the operator's documentation, and of its elastic example.
SIMPLE = """\
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: simple}
spec:
  pytorchReplicaSpecs:
    Master: &replica
      replicas: 1
      restartPolicy: OnFailure
      template:
        spec:
          containers:
          - {name: pytorch, image: "example/mnist:v1", imagePullPolicy: Always, command: [python3, /opt/mnist.py]}
    Worker: *replica
"""
ELASTIC = """\
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: elastic}
spec:
  elasticPolicy:
    rdzvBackend: c10d
    minReplicas: 1
    maxReplicas: 3
    maxRestarts: 100
    metrics: [{type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 80}}}]
  pytorchReplicaSpecs:
    Worker:
      replicas: 2
      restartPolicy: OnFailure
      template:
        spec:
          containers:
          - name: pytorch
            image: example/imagenet:latest
            command: [python, -m, torch.distributed.run, /workspace/imagenet.py]
"""
POD = """
metadata:
  annotations: {sidecar.istio.io/inject: "false"}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 120
  securityContext: {runAsNonRoot: true, runAsUser: 1000, fsGroup: 1000, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: NAME
    image: registry.example/trainer:1.2.3
    command: [python, -m, launcher]
    env:
    - {name: NCCL_DEBUG, value: WARN}
    - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: huggingface, key: token}}}
    ports:
    - {name: metrics-0, containerPort: 9400}
    - {name: metrics-1, containerPort: 9401}
    resources:
      requests: {cpu: "8", memory: 64Gi, nvidia.com/gpu: "2"}
      limits: {memory: 64Gi, nvidia.com/gpu: "2"}
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    volumeMounts:
    - {name: checkpoints, mountPath: /mnt/checkpoints}
    - {name: shm, mountPath: /dev/shm}
  volumes:
  - {name: checkpoints, persistentVolumeClaim: {claimName: checkpoints}}
  - {name: shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}
"""

JOB = """
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: job, labels: {kueue.x-k8s.io/queue-name: team}}
spec:
  nprocPerNode: "2"
  elasticPolicy: {minReplicas: 2, maxReplicas: 2, rdzvBackend: c10d, rdzvConf: [{key: join_timeout, value: "600"}]}
  runPolicy: {cleanPodPolicy: Running, ttlSecondsAfterFinished: 86400, activeDeadlineSeconds: 3600}
  pytorchReplicaSpecs:
    Worker: {replicas: 2, restartPolicy: ExitCode}
"""

RUNTIME = """
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainingRuntime
metadata: {name: runtime}
spec:
  mlPolicy: {numNodes: 1, torch: {}}
  template:
    spec:
      replicatedJobs:
      - name: node
        template:
          metadata: {labels: {trainer.kubeflow.org/trainjob-ancestor-step: trainer}}
          spec: {activeDeadlineSeconds: 3600, backoffLimit: 0}
"""

TRAINJOB = """
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata: {name: job}
spec:
  runtimeRef: {name: runtime, kind: TrainingRuntime}
  trainer:
    image: registry.example/trainer:1.2.3
    numNodes: 2
    numProcPerNode: 2
    env: [{name: NCCL_DEBUG, value: WARN}]
    resourcesPerNode: {limits: {memory: 64Gi, nvidia.com/gpu: "2"}}
"""

CLAIM = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: checkpoints}
spec: {accessModes: [ReadWriteMany], resources: {requests: {storage: 1Ti}}}
"""


def parsed(text: str) -> Object:
    return yaml.load(text, yaml.CSafeLoader)


def pod(name: str) -> Object:
    return parsed(POD.replace("NAME", name))


def good() -> dict[str, Object]:
    """Manifests that break no rule."""
    job, runtime = parsed(JOB), parsed(RUNTIME)
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"] = pod("pytorch")
    runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"] = pod("node")
    return {"job": job, "claim": parsed(CLAIM), "runtime": runtime, "trainjob": parsed(TRAINJOB)}


def changed(*changes: tuple[str, Any]) -> list[Object]:
    """The good manifests with values put at paths like `job/spec/nprocPerNode` (into a list: before that element).

    `...` removes what is there; `\\0` stands for a slash within a key; `LONG` has the shorthands.
    """
    objects = good()
    for path, value in changes:
        for short, long in LONG.items():
            path = path.replace(short, long)
        *way, last = (step.replace("\0", "/") for step in path.split("/"))
        place: Any = objects
        for step in way:
            if isinstance(place, dict):
                place = place.setdefault(step, {})
            else:
                place = place[int(step)]
        if isinstance(place, list):
            place[int(last) : int(last) + (value is ...)] = [] if value is ... else [copy.deepcopy(value)]
        elif value is ...:
            del place[last]
        else:
            place[last] = copy.deepcopy(value)
    return list(objects.values())


def patches(pod: Object, *, job: str = "node", manager: str = "team.example/me") -> list[Object]:
    """runtimePatches of the pod's spec of a replicated job."""
    patch = {"name": job, "template": {"spec": {"template": {"spec": pod}}}}
    return [{"manager": manager, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}}}]


LONG = {
    "TEMPLATE": "job/spec/pytorchReplicaSpecs/Worker/template",
    "WORKER": "job/spec/pytorchReplicaSpecs/Worker",
    "MASTER": "job/spec/pytorchReplicaSpecs/Master",
    "POD": "job/spec/pytorchReplicaSpecs/Worker/template/spec",
    "MAIN": "job/spec/pytorchReplicaSpecs/Worker/template/spec/containers/0",
    "ELASTIC": "job/spec/elasticPolicy",
    "RUN": "job/spec/runPolicy",
    "REPLICATED": "runtime/spec/template/spec/replicatedJobs/0",
    "TRAINER": "trainjob/spec/trainer",
}
MASTER = ("MASTER", {"replicas": 1, "restartPolicy": "Never", "template": pod("pytorch")})
NOT_ELASTIC = ("job/spec/elasticPolicy", ...)
SAFE = {
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
}
BOUNDED = (("WORKER/restartPolicy", "OnFailure"), ("RUN/backoffLimit", 3))
TORCHRUN = ("MAIN/command", ["torchrun", "train.py"])
NO_GPU = ("MAIN/resources", {"limits": {"memory": "16Gi"}})


def rules_of(result: Result) -> set[str]:
    return {finding.rule for finding in result.findings}

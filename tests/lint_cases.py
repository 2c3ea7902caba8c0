"""For each rule of the linter, changes of manifests without findings that make it speak, and where."""

from __future__ import annotations

import copy
from typing import Any

import yaml

Object = dict[str, Any]

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
  mlPolicy: {numNodes: 1, torch: {numProcPerNode: auto}}
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


def pod(name: str) -> Object:
    return yaml.safe_load(POD.replace("NAME", name))


def good() -> dict[str, Object]:
    """Manifests that break no rule."""
    job, runtime = yaml.safe_load(JOB), yaml.safe_load(RUNTIME)
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"] = pod("pytorch")
    runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"] = pod("node")
    return {"job": job, "claim": yaml.safe_load(CLAIM), "runtime": runtime, "trainjob": yaml.safe_load(TRAINJOB)}


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
MASTER = ("MASTER", {"replicas": 1, "restartPolicy": "ExitCode", "template": pod("pytorch")})
NOT_ELASTIC = ("job/spec/elasticPolicy", ...)
TORCHRUN = ("MAIN/command", ["torchrun", "train.py"])
NO_GPU = ("MAIN/resources", {"limits": {"memory": "8Gi"}})

# Rule → cases; each a tuple of changes, all of which together break it.
BROKEN: dict[str, list[tuple[tuple[str, Any], ...]]] = {
    "replica-types": [
        (("job/spec/pytorchReplicaSpecs", ...),),
        (("job/spec/pytorchReplicaSpecs/worker", {"replicas": 1}),),
    ],
    "master-replicas": [(NOT_ELASTIC, MASTER, ("MASTER/replicas", ...)), (NOT_ELASTIC, MASTER, ("MASTER/replicas", 2))],
    "container-name": [(("MAIN/name", "main"),)],
    "image-missing": [(("MAIN/image", ""),), (("MAIN/image", ...),)],
    "job-name": [(("job/metadata/name", "n" * 55),), (("job/metadata/name", "Job.1"),)],
    "no-rendezvous": [(NOT_ELASTIC,)],
    "elastic-with-master": [(MASTER,)],
    "elastic-without-worker": [(MASTER, ("WORKER", ...))],
    "master-init-container": [(NOT_ELASTIC, MASTER)],
    "elastic-bounds": [
        (("ELASTIC/minReplicas", 3),),
        (("WORKER/replicas", 5),),
        (("ELASTIC/maxReplicas", ...), ("ELASTIC/minReplicas", 4)),
    ],
    "elastic-half": [(("ELASTIC/maxReplicas", ...),), (("ELASTIC/minReplicas", ...),)],
    "rdzv-conf-empty": [(("ELASTIC/rdzvConf", []),)],
    "rdzv-backend": [(("ELASTIC/rdzvBackend", "zeus"),), (("ELASTIC/rdzvBackend", "etcd-v2"),)],
    "standalone-nodes": [(("ELASTIC/standalone", True),)],
    "nproc-deprecated": [(("ELASTIC/nProcPerNode", 2),)],
    "nproc-not-gpus": [(("job/spec/nprocPerNode", "4"),), (("job/spec/nprocPerNode", "1"),)],
    "nproc-auto-cpu": [(TORCHRUN, NO_GPU, ("job/spec/nprocPerNode", ...))],
    "nproc-auto-world-size": [(NOT_ELASTIC, MASTER, ("job/spec/nprocPerNode", "auto"))],
    "torchrun-nnodes": [
        (("MAIN/command", ["torchrun", "--nnodes=4", "train.py"]),),
        (("MAIN/command", ["sh", "-c", "torchrun --nnodes 2 train.py"]), ("ELASTIC/maxReplicas", 4)),
    ],
    "no-launcher": [(("MAIN/command", ["python3", "-u", "train.py"]),)],
    "restart-policy-unknown": [(("WORKER/restartPolicy", "exitcode"),)],
    "restart-always": [(("WORKER/restartPolicy", "Always"),)],
    "restart-unbounded": [(("WORKER/restartPolicy", ...),), (("WORKER/restartPolicy", "OnFailure"),)],
    "exitcode-backoff-limit": [(("RUN/backoffLimit", 3),)],
    "exitcode-torchrun": [
        (TORCHRUN,),
        (("MAIN/command", ["python", "-m", "torch.distributed.run", "train.py"]),),
        (("MAIN/command", ["bash", "-c", "exec /opt/bin/torchrun train.py"]),),
    ],
    "spot-never": [
        (("WORKER/restartPolicy", "Never"), ("POD/nodeSelector", {"cloud.google.com/gke-spot": "true"})),
        (("WORKER/restartPolicy", "Never"), ("POD/tolerations", [{"key": "capacity", "value": "SPOT"}])),
    ],
    "clean-pod-policy": [(("RUN/cleanPodPolicy", ...),), (("RUN/cleanPodPolicy", "None"),)],
    "clean-pod-policy-unknown": [(("RUN/cleanPodPolicy", "running"),)],
    "clean-pod-policy-all": [(("RUN/cleanPodPolicy", "All"),)],
    "no-deadline": [(("RUN/activeDeadlineSeconds", ...),)],
    "no-ttl": [(("RUN/ttlSecondsAfterFinished", ...),)],
    "ttl-short": [(("RUN/ttlSecondsAfterFinished", 0),)],
    "negative-number": [
        (("RUN/ttlSecondsAfterFinished", -1),),
        (("RUN/activeDeadlineSeconds", 0),),
        (("RUN/backoffLimit", -1),),
        (("WORKER/replicas", 0),),
    ],
    "suspended": [(("job/metadata/labels", {}), ("RUN/suspend", True))],
    "trainjob-suspended": [(("trainjob/spec/suspend", True),)],
    "managed-by": [(("RUN/managedBy", "me"),)],
    "pod-restart-policy": [(("POD/restartPolicy", "OnFailure"),)],
    "grace-period": [(("POD/terminationGracePeriodSeconds", ...),), (("POD/terminationGracePeriodSeconds", 0),)],
    "nothing-kept": [(("POD/volumes/0", ...), ("MAIN/volumeMounts/0", ...))],
    "trainjob-runtime-ref": [
        (("trainjob/spec/runtimeRef", ...),),
        (("trainjob/spec/runtimeRef/kind", "Runtime"),),
    ],
    "trainjob-runtime-scope": [(("trainjob/spec/runtimeRef/kind", ...),)],
    "trainjob-name": [(("trainjob/metadata/name", "n" * 50),)],
    "trainjob-num-nodes": [(("TRAINER/numNodes", 0),), (("TRAINER/numNodes", -1),)],
    "trainjob-num-proc": [(("TRAINER/numProcPerNode", "eight"),), (("TRAINER/numProcPerNode", 0),)],
    "trainjob-nproc-not-gpus": [(("TRAINER/numProcPerNode", 8),)],
    "trainjob-reserved-env": [(("TRAINER/env/0", {"name": "PET_NNODES", "value": "2"}),)],
    "trainjob-override-env": [
        (
            (
                "trainjob/spec/podTemplateOverrides",
                [
                    {
                        "targetJobs": [{"name": "node"}],
                        "spec": {"containers": [{"name": "node", "env": [{"name": "A"}]}]},
                    }
                ],
            ),
        )
    ],
    "trainjob-unknown-override": [(("trainjob/spec/podTemplateOverrides", [{"targetJobs": [{"name": "nodes"}]}]),)],
    "trainjob-no-deadline": [(("REPLICATED/template/spec/activeDeadlineSeconds", ...),)],
    "trainjob-managed-by": [(("trainjob/spec/managedBy", "me"),)],
    "runtime-no-trainer": [(("REPLICATED/template/metadata", ...),)],
    "runtime-container-name": [(("REPLICATED/template/spec/template/spec/containers/0/name", "main"),)],
    "runtime-replicas": [(("REPLICATED/replicas", 2),)],
    "runtime-ttl": [(("runtime/spec/template/spec/ttlSecondsAfterFinished", 600),)],
    "runtime-restarts-alone": [(("REPLICATED/template/spec/backoffLimit", ...),)],
    "runtime-elastic": [(("runtime/spec/mlPolicy/torch/elasticPolicy", {"minNodes": 1, "maxNodes": 4}),)],
    "gpu-limit": [
        (("MAIN/resources/limits/nvidia.com\0gpu", ...),),
        (("MAIN/resources/limits/nvidia.com\0gpu", "0.5"),),
        (("MAIN/resources/requests/nvidia.com\0gpu", 4),),
    ],
    "request-above-limit": [(("MAIN/resources/requests/memory", "65Gi"),), (("MAIN/resources/limits/cpu", "4000m"),)],
    "memory-limit": [(("MAIN/resources/limits/memory", ...),), (("TRAINER/resourcesPerNode/limits/memory", ...),)],
    "dev-shm": [
        (("MAIN/volumeMounts/1", ...), ("POD/volumes/1", ...)),
        (("REPLICATED/template/spec/template/spec/containers/0/volumeMounts/1", ...),),
    ],
    "dev-shm-size": [
        (("POD/volumes/1/emptyDir/sizeLimit", ...),),
        (("POD/volumes/1/emptyDir/sizeLimit", "65536Mi"),),
    ],
    "claim-shared": [(("claim/spec/accessModes", ["ReadWriteOnce"]),)],
    "gang-min-available": [
        (("RUN/schedulingPolicy", {"minAvailable": 3}),),
        (("RUN/schedulingPolicy", {"minAvailable": 1}),),
        (("RUN/schedulingPolicy", {"scheduleTimeoutSeconds": 60}), ("ELASTIC/minReplicas", 1)),
    ],
    "queue-label-place": [
        (("job/metadata/annotations/kueue.x-k8s.io\0queue-name", "team"),),
        (("TEMPLATE/metadata/labels/kueue.x-k8s.io\0queue-name", "team"),),
    ],
    "two-queues": [(("RUN/schedulingPolicy", {"queue": "volcano"}),)],
    "elastic-autoscaler": [(("ELASTIC/metrics", [{"type": "Resource"}]),)],
    "node-name": [(("POD/nodeName", "node-1"),)],
    "extra-container": [(("POD/containers/1", {"name": "logs", "image": "registry.example/logs:1"}),)],
    "istio-sidecar": [(("TEMPLATE/metadata", ...),)],
    "liveness-probe": [(("MAIN/livenessProbe", {"exec": {"command": ["true"]}}),)],
    "port-taken": [(("MAIN/ports/0", {"name": "extra", "containerPort": 23456}),)],
    "port-name": [
        (("MAIN/ports/0", {"name": "a-name-of-16-sig", "containerPort": 9000}),),
        (("MAIN/ports/0", {"name": "metrics-1", "containerPort": 9000}),),
    ],
    "metrics-ports": [(("MAIN/ports/1", ...),)],
    "mount-unknown": [(("MAIN/volumeMounts/0", {"name": "data", "mountPath": "/data"}),)],
    "image-tag": [
        (("MAIN/image", "registry.example:5000/trainer"),),
        (("MAIN/image", "trainer:latest"),),
        (("TRAINER/image", "trainer"),),
    ],
    "image-pull-never": [(("MAIN/imagePullPolicy", "Never"),)],
    "reserved-env": [
        (("MAIN/env/0", {"name": "RANK", "value": "0"}),),
        (("MAIN/env/0", {"name": "PET_NNODES", "value": "2"}),),
    ],
    "duplicate-env": [(("MAIN/env/0", {"name": "NCCL_DEBUG", "value": "INFO"}),)],
    "env-reference": [
        (("MAIN/env/0", {"name": "HOST", "value": "$(MASTER_ADDR)"}),),
        (("MAIN/env/0", {"name": "LEVEL", "value": "a $(NCCL_DEBUG)"}),),
    ],
    "secret-in-env": [
        (("MAIN/env/0", {"name": "WANDB_API_KEY", "value": "abcdef0123456789"}),),
        (("MAIN/env/0", {"name": "SETTING", "value": "hf_" + "a" * 34}),),
        (("MAIN/args", ["--token", "ghp_" + "a" * 36]),),
        (("TRAINER/env/0", {"name": "HF_TOKEN", "value": "x"}),),
    ],
    "host-namespace": [(("POD/hostNetwork", True),), (("POD/hostIPC", True),)],
    "privileged": [(("MAIN/securityContext/privileged", True),)],
    "host-port": [(("MAIN/ports/0/hostPort", 9400),)],
    "volume-type": [(("POD/volumes/0", {"name": "host", "hostPath": {"path": "/dev/shm"}}),)],
    "run-as-non-root": [
        (("POD/securityContext/runAsNonRoot", ...),),
        (("POD/securityContext/runAsUser", 0),),
        (("MAIN/securityContext/runAsNonRoot", False),),
        (("POD/initContainers", [{"name": "first", "image": "a:1", "securityContext": {"runAsUser": 0}}]),),
    ],
    "run-as-user": [(("POD/securityContext/runAsUser", ...),)],
    "privilege-escalation": [(("MAIN/securityContext/allowPrivilegeEscalation", ...),)],
    "capabilities": [
        (("MAIN/securityContext/capabilities", ...),),
        (("MAIN/securityContext/capabilities/add", ["IPC_LOCK"]),),
    ],
    "seccomp": [(("POD/securityContext/seccompProfile", ...),)],
    "writable-root": [(("MAIN/securityContext/readOnlyRootFilesystem", ...),)],
    "service-account-token": [(("POD/automountServiceAccountToken", ...),)],
    "api-version": [(("job/apiVersion", "kubeflow.org/v1beta1"),), (("runtime/apiVersion", "kubeflow.org/v2alpha1"),)],
    "unknown-field": [(("job/spec/cleanPodPolicy", "Running"),), (("RUN/ttlSeconds", 5),)],
    "unknown-pod-field": [(("POD/resources", {"limits": {}}),), (("MAIN/volumeMount", []),)],
    "trainjob-unknown-field": [
        (("trainjob/spec/runtimePatches", [{"manager": "me"}]),),
        (("trainjob/spec/activeDeadlineSeconds", 60),),
        (("TRAINER/nodes", 2),),
    ],
    "not-a-string": [
        (("job/spec/nprocPerNode", 2),),
        (("job/metadata/labels/team", True),),
        (("ELASTIC/rdzvConf", [{"key": "join_timeout", "value": 600}]),),
    ],
    "env-not-a-string": [(("MAIN/env/0", {"name": "DEBUG", "value": 1}),), (("MAIN/args", ["--steps", 5]),)],
    "pod-label-not-a-string": [
        (("TEMPLATE/metadata/annotations/sidecar.istio.io\0inject", False),),
        (("POD/nodeSelector", {"gpu": True}),),
    ],
    "not-a-number": [
        (("WORKER/replicas", "two"),),
        (("WORKER/replicas", "2"),),
        (("ELASTIC/maxRestarts", 1.5),),
        (("RUN/backoffLimit", True),),
        (("RUN/activeDeadlineSeconds", "1h"),),
        (("RUN/schedulingPolicy", {"minAvailable": [2]}),),
    ],
    "pod-not-a-number": [
        (("POD/terminationGracePeriodSeconds", "120s"),),
        (("POD/securityContext/runAsUser", "1000"),),
        (("MAIN/ports/0/containerPort", "metrics"),),
        (("POD/tolerations", [{"operator": "Exists", "tolerationSeconds": 0.5}]),),
    ],
    "unknown-ignore": [(("job/metadata/annotations", {"yaongi/lint-ignore": "no-tll"}),)],
}
# Rules about the text itself, which no change of objects can break; tests/manifests/test_lint.py has them.
OF_TEXT = {"duplicate-key"}

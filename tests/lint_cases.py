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
        (("MAIN/command", ["deepspeed", "--num_nodes", "3", "train.py"]),),
        (("TRAINER/command", ["torchrun", "--nnodes", "1", "train.py"]),),
        (("MAIN/command", ["sh", "-c", "torchrun --nnodes 3 train.py"]), ("ELASTIC/maxReplicas", 4)),
    ],
    "nnodes-fixed": [
        (("MAIN/command", ["sh", "-c", "torchrun --nnodes 2 train.py"]), ("ELASTIC/maxReplicas", 4)),
    ],
    "nproc-option": [
        (("MAIN/command", ["torchrun", "--nproc_per_node=4", "train.py"]),),
        (("MAIN/command", ["python", "-m", "torch.distributed.run", "--nproc-per-node", "1", "train.py"]),),
        (("MAIN/command", ["python3", "-u", "-m", "torch.distributed.launch", "--nproc_per=8", "train.py"]),),
        (("MAIN/command", ["sh", "-c", "set -e; export N=4\nexec torchrun --nproc_per_node $N train.py"]),),
        (("MAIN/command", ["bash", "-lc", "PET_NPROC_PER_NODE=1 torchrun train.py 2>&1 | tee log"]),),
        (("MAIN/command", ["torchrun"]), ("MAIN/args", ["--nproc_per_node=cpu", "train.py"])),
        (
            ("MAIN/command", ["torchrun", "--nproc_per_node=$(GPUS)", "train.py"]),
            ("MAIN/env/0", {"name": "GPUS", "value": "8"}),
        ),
        (("MAIN/command", ["accelerate", "launch", "--num_processes", "2", "train.py"]),),
        (("MAIN/command", ["deepspeed", "--num_gpus=8", "train.py"]),),
        (("TRAINER/command", ["torchrun", "--nproc_per_node=8", "train.py"]),),
        (("REPLICATED/template/spec/template/spec/containers/0/command", ["torchrun", "--nproc-per-node=1", "a.py"]),),
        (NO_GPU, ("MAIN/command", ["torchrun", "--nproc_per_node=4", "train.py"])),
    ],
    "standalone-option": [
        (("MAIN/command", ["torchrun", "--standalone", "train.py"]),),
        (("MAIN/command", ["bash", "-c", "cd /app && env A=b torchrun --standalone -m train"]),),
        (("TRAINER/command", ["torchrun"]), ("TRAINER/args", ["--standalone", "train.py"])),
        (("MAIN/command", ["mpirun", "-np", "2", "python", "train.py"]),),
    ],
    "node-rank-option": [
        (("MAIN/command", ["torchrun", "--node_rank", "0", "train.py"]),),
        (("MAIN/command", ["accelerate", "launch", "--machine_rank=1", "train.py"]),),
        (("TRAINER/command", ["torchrun", "--node-rank=0", "train.py"]),),
    ],
    "endpoint-local": [
        (("MAIN/command", ["torchrun", "--rdzv_endpoint=localhost:29500", "train.py"]),),
        (("MAIN/command", ["torchrun", "--master_addr", "127.0.0.1", "train.py"]),),
        (("MAIN/command", ["accelerate", "launch", "--main_process_ip=0.0.0.0", "train.py"]),),
        (("TRAINER/command", ["torchrun", "--rdzv-backend=c10d", "train.py"]),),
    ],
    "endpoint-of-nobody": [
        (("MAIN/command", ["torchrun", "--rdzv_endpoint=job-master-0:23456", "train.py"]),),
        (("MAIN/command", ["torchrun", "--master-addr=other-worker-0.team.svc", "train.py"]),),
    ],
    "max-restarts-option": [
        (("MAIN/command", ["torchrun", "--max_restarts=3", "train.py"]), ("ELASTIC/maxRestarts", 5)),
    ],
    "launcher-option": [(("MAIN/command", ["torchrun", "--nprocs=2", "train.py"]),)],
    "launch-differs": [
        (
            NOT_ELASTIC,
            MASTER,
            ("MAIN/command", ["torchrun", "--rdzv_id=1", "train.py"]),
            ("MASTER/template/spec/containers/0/command", ["torchrun", "--rdzv_id=2", "train.py"]),
        )
    ],
    "no-launcher": [
        (("MAIN/command", ["python3", "-u", "train.py"]),),
        (("MAIN/command", ["sh", "-c", "pip list && python /app/train.py --epochs 3"]),),
        (
            ("MAIN/command", ["/bin/bash"]),
            ("MAIN/args", ["-euc", "# start\nexec python \\\n  train.py | tee /tmp/log"]),
        ),
        (("MAIN/command", ["env", "OMP_NUM_THREADS=1", "/usr/bin/python3.11", "train.py"]),),
        (("MAIN/args", ["python", "train.py"]), ("MAIN/command", ...)),
        (("TRAINER/command", ["python", "train.py"]),),
        (("REPLICATED/template/spec/template/spec/containers/0/command", ["python", "train.py"]),),
    ],
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
    "extra-container": [(("POD/containers/1", {"name": "logs", "image": "registry.example/logs:1", **SAFE}),)],
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
    "not-expanded": [
        (("MAIN/command", ["torchrun", "--nproc_per_node=$GPUS", "train.py"]), *BOUNDED),
        (("MAIN/args", ["--lr", "${LR}"]),),
        (("MAIN/args", ["$(UNDEFINED)"]),),
        (("TRAINER/command", ["torchrun", "$SCRIPT"]),),
    ],
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
        (
            (
                "POD/initContainers",
                [{"name": "first", "image": "a:1", "securityContext": {**SAFE["securityContext"], "runAsUser": 0}}],
            ),
        ),
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
    "unknown-field": [
        (("job/spec/cleanPodPolicy", "Running"),),
        (("RUN/ttlSeconds", 5),),
        (("POD/resources", {"limits": {}}),),
        (("MAIN/volumeMount", []),),
        (("MAIN/resources/limit", {"cpu": 8}),),
        (("MAIN/resources/nvidia.com\0gpu", 8),),
        (("MAIN/env/0", {"name": "A", "valuefrom": {}}),),
        (("trainjob/spec/runtimePatches", [{"manager": "me"}]),),
        (("trainjob/spec/activeDeadlineSeconds", 60),),
        (("TRAINER/nodes", 2),),
        (("runtime/spec/template/spec/volumeClaimPolicies", []),),
        (("runtime/spec/mlPolicy/torch/nprocPerNode", 2),),
    ],
    "not-filled-in": [
        (("WORKER/replicas", "${NODES}"),),
        (("MAIN/resources/requests/memory", "{{ .Values.memory }}"),),
        (("POD/nodeSelector", {"instance": "$INSTANCE_TYPE"}),),
        (("MAIN/ports/0", {"name": "other", "containerPort": "<port>"}),),
    ],
    "missing-field": [
        (("MAIN/env/0", {"value": "x"}),),
        (("job/metadata/name", ...),),
        (("MAIN/volumeMounts/0", {"name": "shm"}),),
        (("POD/initContainers", [{"image": "a:1", **SAFE}]),),
        (("MAIN/env/0", {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}),),
    ],
    "not-a-string": [
        (("job/spec/nprocPerNode", 2),),
        (("job/metadata/labels/team", True),),
        (("ELASTIC/rdzvConf", [{"key": "join_timeout", "value": 600}]),),
        (("MAIN/env/0", {"name": "DEBUG", "value": 1}),),
        (("MAIN/args", ["--steps", 5]),),
        (("TEMPLATE/metadata/annotations/other", False),),
        (("POD/nodeSelector", {"gpu": True}),),
        (("TRAINER/env/0", {"name": "A", "value": True}),),
    ],
    "wrong-type": [
        (("MAIN/command", "torchrun train.py"),),
        (("TRAINER/command", "torchrun train.py"),),
        (("MAIN/env", {"NCCL_DEBUG": "INFO"}),),
        (("MAIN/args", [None]),),
        (("RUN/suspend", "false"),),
        (("POD/nodeSelector", [{"gpu": "a100"}]),),
        (("MAIN/resources/requests", [{"cpu": 8}]),),
        (("MAIN/securityContext/privileged", "false"),),
    ],
    "not-a-quantity": [
        (("MAIN/resources/requests/memory", "64GB"),),
        (("MAIN/resources/requests/memory", "8 Gi"),),
        (("MAIN/resources/requests/memory", "64gi"),),
        (("TRAINER/resourcesPerNode/requests", {"cpu": "eight"}),),
        (("POD/volumes/0", {"name": "tmp", "emptyDir": {"sizeLimit": "1GB"}}),),
    ],
    "memory-unit": [
        (("MAIN/resources/requests/memory", 64),),
        (("MAIN/resources/requests/memory", "512m"),),
    ],
    "unknown-word": [
        (("MAIN/imagePullPolicy", "Sometimes"),),
        (("POD/dnsPolicy", "clusterFirst"),),
        (("POD/tolerations", [{"operator": "exists"}]),),
    ],
    "out-of-range": [
        (("MAIN/ports/0", {"name": "other", "containerPort": 70000}),),
        (("MAIN/resources/requests/cpu", -1),),
        (("MAIN/resources/requests/cpu", "-500m"),),
        (("POD/terminationGracePeriodSeconds", -5),),
        (("POD/securityContext/runAsUser", -1),),
    ],
    "written-twice": [
        (("POD/volumes/0", {"name": "shm", "emptyDir": {}}),),
        (("MAIN/volumeMounts/0", {"name": "shm", "mountPath": "/mnt/checkpoints"}),),
        (("POD/initContainers", [{"name": "a", "image": "a:1", **SAFE}, {"name": "a", "image": "a:1", **SAFE}]),),
        (("MAIN/ports/0", {"name": "other", "containerPort": 9400}),),
    ],
    "one-of": [
        (("MAIN/env/0", {"name": "A", "value": "x", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}),),
        (("POD/volumes/0", {"name": "tmp"}),),
        (("POD/volumes/0", {"name": "tmp", "emptyDir": None}),),
        (("POD/volumes/0", {"name": "tmp", "emptyDir": {}, "configMap": {"name": "c"}}),),
        (("MAIN/env/0", {"name": "A", "valueFrom": {}}),),
        (("MAIN/readinessProbe", {"periodSeconds": 5}),),
    ],
    "bad-name": [
        (("POD/volumes/0", {"name": "My_Volume", "emptyDir": {}}),),
        (("POD/volumes/0", {"name": "tmp", "emptyDir": {"medium": "memory"}}),),
        (("trainjob/metadata/name", "My_Job"),),
        (("POD/initContainers", [{"name": "pytorch", "image": "a:1", **SAFE}]),),
        (("MAIN/env/0", {"name": "A=B", "value": "x"}),),
        (("MAIN/resources/limits/gpu", 2),),
        (("MAIN/resources/limits/nvidia.com\0gpus", 2),),
        (("job/metadata/labels/team", "two words"),),
        (("MAIN/ports/0", {"name": "Metrics", "containerPort": 9500}),),
    ],
    "not-a-number": [
        (("WORKER/replicas", "two"),),
        (("WORKER/replicas", "2"),),
        (("ELASTIC/maxRestarts", 1.5),),
        (("RUN/backoffLimit", True),),
        (("RUN/activeDeadlineSeconds", "1h"),),
        (("RUN/schedulingPolicy", {"minAvailable": [2]}),),
        (("POD/priority", "high"),),
        (("POD/securityContext/runAsUser", "1000"),),
        (("MAIN/ports/0/containerPort", "metrics"),),
        (("POD/tolerations", [{"operator": "Exists", "tolerationSeconds": 0.5}]),),
    ],
    "unknown-ignore": [(("job/metadata/annotations", {"yaongi/lint-ignore": "no-tll"}),)],
}
# A launcher without an entrypoint of one's own is no trap under this policy.
_BY_LAUNCHER = (
    "nproc-auto-cpu",
    "torchrun-nnodes",
    "nnodes-fixed",
    "nproc-option",
    "standalone-option",
    "node-rank-option",
    "endpoint-local",
    "endpoint-of-nobody",
    "max-restarts-option",
    "launcher-option",
    "launch-differs",
)
for _rule in _BY_LAUNCHER:
    BROKEN[_rule] = [(*case, *BOUNDED) for case in BROKEN[_rule]]
# Rule → others that its cases break too.
ALONG: dict[str, set[str]] = {
    "elastic-bounds": {"elastic-half"},
    "launch-differs": {"master-init-container"},
    "master-replicas": {"master-init-container"},
    "nproc-auto-world-size": {"master-init-container"},
}
# Rules about the text itself, which no change of objects can break; tests/manifests/test_lint.py has them.
OF_TEXT = {"duplicate-key"}

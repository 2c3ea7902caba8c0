"""Cases of the linter's rules about a job's structure and the command lines of its launchers."""

from __future__ import annotations

from lint_manifests import BOUNDED, MASTER, NO_GPU, NOT_ELASTIC, TORCHRUN, Case, patches

TARGETS = [{"name": "node"}]
NODE_ENV = {"name": "node", "env": [{"name": "A"}]}
# Rule → cases; those of TrainJobs are for Trainer 2.3.
JOBS: dict[str, list[Case]] = {
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
    "trainjob-num-proc": [(("TRAINER/numProcPerNode", 0),), (("TRAINER/numProcPerNode", -1),)],
    "trainjob-nproc-not-gpus": [(("TRAINER/numProcPerNode", 8),)],
    "trainjob-reserved-env": [(("TRAINER/env/0", {"name": "PET_NNODES", "value": "2"}),)],
    "trainjob-override-env": [(("trainjob/spec/runtimePatches", patches({"containers": [NODE_ENV]})),)],
    "trainjob-unknown-override": [
        (("trainjob/spec/runtimePatches", patches({"nodeSelector": {"pool": "a"}}, job="nodes")),),
    ],
    "trainjob-unknown-container": [
        (("trainjob/spec/runtimePatches", patches({"containers": [{"name": "trainer", "volumeMounts": []}]})),),
        (("trainjob/spec/runtimePatches", patches({"initContainers": [{"name": "node", "volumeMounts": []}]})),),
    ],
    "trainjob-patch-manager": [
        (("trainjob/spec/runtimePatches", patches({"nodeSelector": {"pool": "a"}}, manager="me")),),
        (("trainjob/spec/runtimePatches", [{"manager": "My Team/me"}]),),
    ],
    "trainjob-no-deadline": [(("REPLICATED/template/spec/activeDeadlineSeconds", ...),)],
    "trainjob-managed-by": [(("trainjob/spec/managedBy", "me"),)],
    "runtime-no-trainer": [(("REPLICATED/template/metadata", ...),)],
    "runtime-container-name": [(("REPLICATED/template/spec/template/spec/containers/0/name", "main"),)],
    "runtime-replicas": [(("REPLICATED/replicas", 2),)],
    "runtime-ttl": [(("runtime/spec/template/spec/ttlSecondsAfterFinished", 600),)],
    "runtime-restarts-alone": [(("REPLICATED/template/spec/backoffLimit", ...),)],
}
# Rules, or their cases, about fields that Trainer 2.2 removed.
BEFORE_2_2: dict[str, list[Case]] = {
    "trainjob-num-proc": [(("TRAINER/numProcPerNode", 0),)],
    "trainjob-override-env": [
        (("trainjob/spec/podTemplateOverrides", [{"targetJobs": TARGETS, "spec": {"containers": [NODE_ENV]}}]),)
    ],
    "trainjob-unknown-override": [
        (("trainjob/spec/podTemplateOverrides", [{"targetJobs": [{"name": "nodes"}]}]),),
    ],
    "trainjob-unknown-container": [
        (
            (
                "trainjob/spec/podTemplateOverrides",
                [{"targetJobs": TARGETS, "spec": {"containers": [{"name": "trainer", "volumeMounts": []}]}}],
            ),
        ),
    ],
    "runtime-elastic": [(("runtime/spec/mlPolicy/torch/elasticPolicy", {"minNodes": 1, "maxNodes": 4}),)],
    "unknown-field": [
        (("trainjob/spec/runtimePatches", [{"manager": "me.example/x"}]),),
        (("trainjob/spec/activeDeadlineSeconds", 60),),
        (("runtime/spec/template/spec/volumeClaimPolicies", []),),
    ],
}
# A launcher without its own entrypoint is not an error under this policy.
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
    JOBS[_rule] = [(*case, *BOUNDED) for case in JOBS[_rule]]

"""For each rule of the linter, changes of manifests without findings that trigger it, and where."""

from __future__ import annotations

from lint_job_cases import BEFORE_2_2, JOBS
from lint_manifests import BOUNDED, SAFE, Case

NODE_ANNOTATIONS = "REPLICATED/template/spec/template/metadata/annotations"
# Rule → cases: those of jobs, then those of pods, their fields and values.
BROKEN: dict[str, list[Case]] = {
    **JOBS,
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
    "queue-label-missing": [
        (("trainjob/metadata/labels/kueue.x-k8s.io\0priority-class", "urgent"),),
        (
            ("job/metadata/labels/kueue.x-k8s.io\0queue-name", ...),
            ("TEMPLATE/metadata/annotations/kueue.x-k8s.io\0podset-required-topology", "rack"),
        ),
    ],
    "topology-twice": [
        (
            ("TEMPLATE/metadata/annotations/kueue.x-k8s.io\0podset-required-topology", "rack"),
            ("TEMPLATE/metadata/annotations/kueue.x-k8s.io\0podset-preferred-topology", "block"),
        ),
        (
            (f"{NODE_ANNOTATIONS}/kueue.x-k8s.io\0podset-required-topology", "rack"),
            (
                f"{NODE_ANNOTATIONS}/kueue.x-k8s.io\0podset-preferred-topology",
                "rack",
            ),
        ),
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
        (("trainjob/spec/podTemplateOverrides", []),),
        (("trainjob/spec/labels", {"team": "a"}),),
        (("trainjob/spec/annotations", {"team": "a"}),),
        (("trainjob/spec/ttlSecondsAfterFinished", 60),),
        (("TRAINER/nodes", 2),),
        (("runtime/spec/mlPolicy/torch/numProcPerNode", 2),),
        (("runtime/spec/mlPolicy/torch/elasticPolicy", {}),),
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
# Case and release of Trainer: the newest, and the last one with the fields that 2.2 removed.
CASES = [
    *((rule, "2.3", case) for rule, cases in BROKEN.items() for case in cases),
    *((rule, "2.1", case) for rule, cases in BEFORE_2_2.items() for case in cases),
]
# Rule → other rules that its cases also break.
ALONG: dict[str, set[str]] = {
    "elastic-bounds": {"elastic-half"},
    "launch-differs": {"master-init-container"},
    "master-replicas": {"master-init-container"},
    "nproc-auto-world-size": {"master-init-container"},
    "trainjob-runtime-ref": {"trainjob-no-deadline"},  # which its runtime would have
    "trainjob-runtime-scope": {"trainjob-no-deadline"},
}
# Rules about the text itself, which no change of objects can break; tests/manifests/test_lint_documents.py has them.
OF_TEXT = {"duplicate-key"}

#!/usr/bin/env bash
# The end-to-end test on a real cluster: builds the images, loads them onto the nodes, runs tests/e2e.
#
#   KUBECONFIG      the cluster; it needs the Kubeflow training operator (PyTorchJob v1), Kubeflow Trainer 2.1 to 2.3 (TrainJob), Kueue 0.17
#                   and a default storage class with ReadWriteMany
#   YAONGI_IMAGES   "given": the nodes have the images or can pull them (names: YAONGI_{PIPELINE,TRAINER,PROMETHEUS}_IMAGE)
#   LOAD_IMAGE      command that loads an image onto the nodes, called with its name, for kind: "kind load docker-image"
#   PARALLEL        how tests run in parallel, as pytest-xdist's options; "-n 0": one after another
#   YAONGI_MEGATRON_CORE  a folder with the package megatron-core, for workers on CPUs; without it, it is downloaded
#   YAONGI_CLUSTER  instead of a running cluster: a program that starts one, with the verbs build, up, base-image, install-operator,
#                   install-trainer RELEASE, install-kueue and build-image NAME CONTEXT ARGUMENT... (build and load); it writes KUBECONFIG
#   TRAINER         the release of Kubeflow Trainer for that cluster: 2.3 (default), with its alpha status API switched on; or 2.1, for the
#                   long way: once more all that is about TrainJobs, for example
#                   TRAINER=2.1 make e2e TESTS="tests/e2e/test_{trainjob,lint_cluster,manifests_cluster,queue_cluster}.py"
#
# Arguments are passed to pytest instead of tests/e2e.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() { echo "e2e: $*" >&2; exit 1; }
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || fail "no $python; run 'make setup' first or set PYTHON"
[ -n "${KUBECONFIG:-}" ] || fail "set KUBECONFIG to a cluster with the Kubeflow training operator; for kind also LOAD_IMAGE='kind load docker-image'"
export KUBECONFIG
TRAINER=${TRAINER:-2.3}
# Trainer's status API is off unless its configuration says otherwise. Server-side as the program installs it, so that both can be repeated.
show_progress() {
    kubectl -n kubeflow-system get configmap kubeflow-trainer-config -o yaml | sed '/^    featureGates:/,/^      TrainJobStatus:/d' |
        sed 's/^    statusServer:/    featureGates:\n      TrainJobStatus: true\n&/' | kubectl apply --server-side -f - &&
        kubectl -n kubeflow-system rollout restart deployment kubeflow-trainer-controller-manager &&
        kubectl -n kubeflow-system rollout status deployment kubeflow-trainer-controller-manager --timeout=300s
}
section() { echo; echo "=== e2e: $* ($(date +%T))"; }

if [ -n "${YAONGI_CLUSTER:-}" ]; then
    section "start a cluster with $YAONGI_CLUSTER"
    "$YAONGI_CLUSTER" build
    "$YAONGI_CLUSTER" up
    install_operators() {
        "$YAONGI_CLUSTER" install-operator && "$YAONGI_CLUSTER" install-trainer "$TRAINER" && { [ "$TRAINER" = 2.1 ] || show_progress; } &&
            "$YAONGI_CLUSTER" install-kueue
    }
    { install_operators || install_operators; } & # while the images are built; a busy machine may be slower than a rollout's limit
    operators=$!
    export BUILD_IMAGE="${BUILD_IMAGE:-$YAONGI_CLUSTER build-image}"
fi
command -v kubectl >/dev/null || fail "kubectl is not installed"
kubectl get --raw /readyz >/dev/null || fail "the cluster of $KUBECONFIG does not answer"
check_operators() {
    kubectl get crd pytorchjobs.kubeflow.org >/dev/null || fail "the cluster lacks the Kubeflow training operator (PyTorchJob v1)"
    kubectl get crd trainjobs.trainer.kubeflow.org >/dev/null || fail "the cluster lacks Kubeflow Trainer with JobSet (TrainJob)"
    kubectl get crd workloads.kueue.x-k8s.io >/dev/null || fail "the cluster lacks Kueue"
}
[ -n "${operators:-}" ] || check_operators

export YAONGI_PIPELINE_IMAGE=${YAONGI_PIPELINE_IMAGE:-localhost/yaongi-pipeline:0.1.0}
export YAONGI_TRAINER_IMAGE=${YAONGI_TRAINER_IMAGE:-localhost/yaongi-trainer:0.1.0}
export YAONGI_PROMETHEUS_IMAGE=${YAONGI_PROMETHEUS_IMAGE:-localhost/prometheus:2.42}
if [ "${YAONGI_IMAGES:-}" != given ]; then
    section "build the images"
    docker/build.sh
    docker/image.sh build "$YAONGI_PROMETHEUS_IMAGE" tests/e2e/prometheus \
        ${PIPELINE_BASE_IMAGE:+--build-arg "BASE_IMAGE=$PIPELINE_BASE_IMAGE"}
    if [ -n "${LOAD_IMAGE:-}" ]; then
        for image in "$YAONGI_PIPELINE_IMAGE" "$YAONGI_TRAINER_IMAGE" "$YAONGI_PROMETHEUS_IMAGE"; do $LOAD_IMAGE "$image"; done
    fi
fi

if [ -z "${YAONGI_MEGATRON_CORE:-}" ]; then
    # Not in build/, which builders of wheels empty.
    export YAONGI_MEGATRON_CORE=$PWD/.venv/megatron-core
    rm -rf "$YAONGI_MEGATRON_CORE"
    "$(command -v uv || echo .uv/bin/uv)" pip install --quiet --python "$python" --no-deps --target "$YAONGI_MEGATRON_CORE" \
        "$(sed -n 's/^\(megatron-core==[^ ]*\).*/\1/p' requirements-peers.txt)" psutil
fi

if [ -n "${operators:-}" ]; then
    wait "$operators" || fail "the operators were not installed"
    check_operators
fi

section "the cluster"
kubectl get nodes -o wide
kubectl get storageclass
section "pytest"
# The output of tests, including times, is printed at the end (-rP), since tests run in parallel.
exec "$python" -m pytest ${PARALLEL:--n 2 --no-loadscope-reorder} -m e2e -v -rP --timeout=1800 "${@:-tests/e2e}"

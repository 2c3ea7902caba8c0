#!/usr/bin/env bash
# The end-to-end test on a real backend of Kubeflow Pipelines, 2.15 or newer, with the training operator in the same cluster.
#
#   KFP_HOST          its address, as the tests reach it without a login: kubectl -n kubeflow port-forward svc/ml-pipeline 8888
#   KUBECONFIG        its cluster; a default storage class with ReadWriteMany
#   KFP_NAMESPACE     the namespace of its runs (default: kubeflow)
#   YAONGI_{PIPELINE,TRAINER}_IMAGE   images that the nodes have or can pull (default: those of `make images`)
#
# It makes the claims and grants the launcher's rights to the account of the runs, and leaves both. Arguments are passed to pytest
# instead of tests/e2e_kfp.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() { echo "e2e-kfp: $*" >&2; exit 1; }
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || fail "no $python; run 'make setup' first or set PYTHON"
[ -n "${KFP_HOST:-}" ] || fail "set KFP_HOST to the address of Kubeflow Pipelines, such as http://127.0.0.1:8888"
[ -n "${KUBECONFIG:-}" ] || fail "set KUBECONFIG to the cluster of that backend"
command -v kubectl >/dev/null || fail "kubectl is not installed"
export KFP_HOST KUBECONFIG KFP_NAMESPACE=${KFP_NAMESPACE:-kubeflow}
kubectl get --raw /readyz >/dev/null || fail "the cluster of $KUBECONFIG does not answer"
kubectl get crd pytorchjobs.kubeflow.org >/dev/null || fail "the cluster lacks the Kubeflow training operator (PyTorchJob v1)"
curl -sf --max-time 20 "$KFP_HOST/apis/v2beta1/healthz" >/dev/null || fail "Kubeflow Pipelines does not answer at $KFP_HOST"
"$python" -m manifests.generate rbac "$KFP_NAMESPACE" | kubectl apply -f -
kubectl apply -n "$KFP_NAMESPACE" -f manifests/base/storage.yaml
exec "$python" -m pytest -m e2e_kfp -v -rP --timeout=1800 "${@:-tests/e2e_kfp}"

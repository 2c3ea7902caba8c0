#!/usr/bin/env bash
# Train on the two GPUs of this machine, without Kubernetes: `yaongi dual`, with its flags (docs/dual.md).
#
#   ./run_h100_dual.sh                                            a test of 10 steps
#   ./run_h100_dual.sh --train --dataset-path mixed_pretraining.jsonl
#   ./run_h100_dual.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for yaongi in "$root/.venv/bin/yaongi" "$(command -v yaongi || true)"; do
    [ ! -x "$yaongi" ] || exec "$yaongi" dual "$@"
done
echo "error: yaongi is not installed; install it: make -C $root setup" >&2
exit 69

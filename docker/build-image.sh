#!/usr/bin/env bash
# docker/build-image.sh NAME CONTEXT ARGUMENT...: builds one image with what this machine has, or with $BUILD_IMAGE.
set -euo pipefail
name=$1 context=$2
shift 2
[ -z "${BUILD_IMAGE:-}" ] || exec $BUILD_IMAGE "$name" "$context" "$@"
for engine in buildah podman docker; do
    if command -v "$engine" >/dev/null && "$engine" info >/dev/null 2>&1; then
        [ "$engine" = buildah ] || exec "$engine" build -t "$name" "$@" "$context"
        exec buildah bud --layers -t "$name" "$@" "$context"
    fi
done
echo "docker/build-image.sh: none of buildah, podman and docker works here; install one or set BUILD_IMAGE" >&2
exit 2

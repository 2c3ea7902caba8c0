#!/usr/bin/env bash
# docker/image.sh VERB NAME [ARGUMENT...]: one interface to buildah, podman or docker, whichever works on this machine.
#
#   build NAME CONTEXT ARGUMENT...   builds the image, with $BUILD_IMAGE if that is set
#   run NAME COMMAND...              runs a command in it, without its entrypoint
#   labels NAME                      prints its labels, one NAME=VALUE per line
#   digest NAME                      prints its digest in the registry; nothing if the image is not on this machine
set -euo pipefail
verb=$1 name=$2
shift 2
[ "$verb" != build ] || [ -z "${BUILD_IMAGE:-}" ] || exec $BUILD_IMAGE "$name" "$@"

for engine in buildah podman docker; do
    ! command -v "$engine" >/dev/null || ! "$engine" info >/dev/null 2>&1 || break
    engine=
done
[ -n "$engine" ] || { echo "docker/image.sh: none of buildah, podman and docker works here; install one" >&2; exit 2; }
[ "$engine" = buildah ] && inspect=(buildah inspect --type image) || inspect=("$engine" image inspect)
[ "$verb" = build ] || [ "$verb" = digest ] || "${inspect[@]}" "$name" >/dev/null 2>&1 || {
    echo "docker/image.sh: $engine has no image $name; build it, or set CONTAINERS_STORAGE_CONF to the storage of \$BUILD_IMAGE" >&2
    exit 2
}

case $verb-$engine in
build-buildah) exec buildah bud --layers -t "$name" "${@:2}" "$1" ;;
build-*) exec "$engine" build -t "$name" "${@:2}" "$1" ;;
run-buildah)
    container=$(buildah from --pull-never "$name")
    trap 'buildah rm "$container" >/dev/null' EXIT
    buildah run --isolation chroot "$container" -- "$@"
    ;;
run-*) exec "$engine" run --rm --network none --entrypoint '' "$name" "$@" ;;
labels-buildah) exec "${inspect[@]}" --format '{{range $k, $v := .OCIv1.Config.Labels}}{{printf "%s=%s\n" $k $v}}{{end}}' "$name" ;;
labels-*) exec "${inspect[@]}" --format '{{range $k, $v := .Config.Labels}}{{printf "%s=%s\n" $k $v}}{{end}}' "$name" ;;
digest-buildah) "${inspect[@]}" --format '{{.FromImageDigest}}' "$name" 2>/dev/null || true ;;
digest-*) "${inspect[@]}" --format '{{range .RepoDigests}}{{println .}}{{end}}' "$name" 2>/dev/null | sed -n '1s/.*@//p' || true ;;
*) echo "docker/image.sh: unknown verb $verb; use build, run, labels or digest" >&2; exit 2 ;;
esac

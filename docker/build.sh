#!/usr/bin/env bash
# Builds both images of the Dockerfile (PREFIXyaongi-{pipeline,trainer}:TAG), and a bill of materials of each: dist/sbom/*.cdx.json.
#
#   BASE_IMAGE           base of the trainer image (default: an NGC PyTorch image, whose torch is used)
#   PIPELINE_BASE_IMAGE  base of the pipeline image, in which the wheel of both is built too (default: python:3.11-slim-bookworm)
#   IMAGE_PREFIX, TAG    default: localhost/ and the project's version
#   CPU_ONLY=1           a smaller trainer image, without packages that only GPUs need
#   MEGATRON=1           a third image, yaongi-megatron: the trainer's with Megatron-LM
#   MEGATRON_COMMIT      another commit of Megatron-LM (default: that of core_v0.12.3)
#   BUILD_IMAGE          builder, called as `BUILD_IMAGE NAME CONTEXT ARGUMENT...` (default: buildah, podman or docker)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || { echo "docker/build.sh: no $python; run 'make setup' first or set PYTHON" >&2; exit 2; }
version=$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
revision=$(git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)
# The time of the last commit, so that the same sources give the same labels.
created=$(date -u -d "@${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}" +%Y-%m-%dT%H:%M:%SZ)
# The URL of the published sources; empty for a clone of a local folder. Anything before an @ is removed, as it may be a password.
origin=$({ git remote get-url origin 2>/dev/null || true; } | sed -nE 's#^(https?://|ssh://|git@)([^/]*@)?([^:/]+)(:[0-9]+)?[:/](.*)$#https://\3/\5#p' | sed 's/\.git$//')

default() { sed -n "s/^ARG $1=//p" Dockerfile; }
pipeline_base=${PIPELINE_BASE_IMAGE:-$(default PIPELINE_BASE_IMAGE)}
trainer_base=${BASE_IMAGE:-$(default BASE_IMAGE)}

build() { # IMAGE BASE ARGUMENT...
    local image=$1 base=$2 name=${IMAGE_PREFIX-localhost/}yaongi-$1:${TAG:-$version} label digest labels=()
    shift 2
    digest=$(docker/image.sh digest "$base")
    for label in "version=$version" "revision=$revision" "created=$created" "base.name=$base" \
        ${digest:+"base.digest=$digest"} ${origin:+"source=$origin"}; do
        labels+=(--label "org.opencontainers.image.$label")
    done
    docker/image.sh build "$name" . "${labels[@]}" "$@"
    "$python" docker/sbom.py "$name" "dist/sbom/yaongi-$image.cdx.json"
    echo "built $name ($revision), dist/sbom/yaongi-$image.cdx.json"
}
build pipeline "$pipeline_base" --target pipeline --build-arg "PIPELINE_BASE_IMAGE=$pipeline_base"
build trainer "$trainer_base" --build-arg "PIPELINE_BASE_IMAGE=$pipeline_base" --build-arg "BASE_IMAGE=$trainer_base" \
    --build-arg "CPU_ONLY=${CPU_ONLY:-0}"
if [ "${MEGATRON:-0}" = 1 ]; then
    trainer=${IMAGE_PREFIX-localhost/}yaongi-trainer:${TAG:-$version}
    build megatron "$trainer" -f docker/megatron.Dockerfile --build-arg "BASE_IMAGE=$trainer" \
        ${MEGATRON_COMMIT:+--build-arg "MEGATRON_COMMIT=$MEGATRON_COMMIT"}
fi

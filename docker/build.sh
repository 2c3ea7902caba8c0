#!/usr/bin/env bash
# Builds the wheel once and both images from it: PREFIXyaongi-{pipeline,trainer}:TAG.
#
#   BASE_IMAGE           base of the trainer image (default: an NGC PyTorch image, whose torch is kept)
#   PIPELINE_BASE_IMAGE  base of the pipeline image (default: python:3.11-slim-bookworm)
#   IMAGE_PREFIX, TAG    default: localhost/ and the project's version
#   CPU_ONLY=1           a smaller trainer image, without what only GPUs need
#   BUILD_IMAGE          builder, called as `BUILD_IMAGE NAME CONTEXT ARGUMENT...` (default: buildah, podman or docker)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || { echo "docker/build.sh: no $python; run 'make setup' first or set PYTHON" >&2; exit 2; }
version=$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
revision=$(git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)

# A clean build folder and a fixed time (a zip's earliest) make the wheel a function of the sources: unchanged, it hits the layer cache.
rm -rf build dist
export SOURCE_DATE_EPOCH=315532800
"$python" -m build --wheel --no-isolation --outdir dist . >/dev/null
"$python" docker/check_wheel.py dist/yaongi-"$version"-*.whl

build() {
    local image=$1 name=${IMAGE_PREFIX-localhost/}yaongi-$1:${TAG:-$version}
    shift
    docker/build-image.sh "$name" . -f "docker/$image.Dockerfile" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" "$@"
    echo "built $name ($revision)"
}
build pipeline ${PIPELINE_BASE_IMAGE:+--build-arg "BASE_IMAGE=$PIPELINE_BASE_IMAGE"}
build trainer --build-arg "CPU_ONLY=${CPU_ONLY:-0}" ${BASE_IMAGE:+--build-arg "BASE_IMAGE=$BASE_IMAGE"}

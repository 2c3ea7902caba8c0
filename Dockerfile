# All images of one wheel, which is built here too, so that a clone is enough: `docker build -t yaongi-h100 .`
#
#   trainer (default)  the whole pipeline on a machine with GPUs, and the workers on a cluster
#   pipeline           the pipeline's steps on a cluster; small, without torch
#
# docker/build.sh (`make images`) builds both, with their labels and bills of materials. What changes least comes first:
# a change of the sources repeats only the wheel and the layer that installs it.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
ARG PIPELINE_BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PIPELINE_BASE_IMAGE} AS wheel
COPY requirements-build.lock /tmp/
RUN python3 -m pip install --no-cache-dir --no-deps --require-hashes --target /tmp/tools -r /tmp/requirements-build.lock
WORKDIR /src
COPY pyproject.toml README.md LICENSE docker/check_wheel.py ./
COPY pipelines pipelines
COPY components components
COPY manifests manifests
COPY trainer trainer
# Fixed modes and a fixed time (the earliest of zip): the same sources give the same bytes, whoever cloned them when.
RUN chmod -R u=rwX,go=rX . \
    && SOURCE_DATE_EPOCH=315532800 PYTHONPATH=/tmp/tools python3 -m build --wheel --no-isolation --outdir /wheel . \
    && python3 check_wheel.py /wheel/yaongi-*.whl


FROM ${PIPELINE_BASE_IMAGE} AS pipeline
USER 0:0
RUN set -eu; \
    apt-get update; \
    apt-get install -y --no-install-recommends 'tini=0.19.*'; \
    rm -rf /var/lib/apt/lists/*; \
    getent group 1000 >/dev/null || groupadd --gid 1000 yaongi; \
    getent passwd 1000 >/dev/null || useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp yaongi; \
    python3 -m venv --without-pip /opt/yaongi

COPY requirements-pipeline.lock requirements-uv.lock /opt/yaongi/
WORKDIR /opt/yaongi
# uv unpacks and compiles much faster than pip; it is removed afterwards.
RUN set -eu; \
    python3 -m pip install --no-cache-dir --no-deps --require-hashes --target /tmp/uv -r requirements-uv.lock; \
    /tmp/uv/bin/uv pip install --python bin/python --system-certs --no-cache --compile-bytecode --no-deps --require-hashes \
        -r requirements-pipeline.lock; \
    rm -r /tmp/uv

COPY docker/entry.sh /usr/local/bin/entry
COPY --from=wheel /wheel /opt/yaongi/wheel
RUN python3 -m pip --python /opt/yaongi/bin/python install --no-cache-dir --no-deps --no-index /opt/yaongi/wheel/yaongi-*.whl \
    && /opt/yaongi/bin/python -c 'import kfp, kubernetes; print("kfp", kfp.__version__)' \
    && /opt/yaongi/bin/yaongi --version

ENV PATH=/opt/yaongi/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/tmp/cache/huggingface \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="yaongi pipeline" \
      org.opencontainers.image.description="Runs the pipeline's steps: yaongi run JOB, or as the image of its KFP components" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/entry"]
CMD ["yaongi", "--version"]


FROM ${BASE_IMAGE} AS trainer
# 1: without packages that only GPUs need, for tests on CPUs.
ARG CPU_ONLY=0
# Compilers at once; each takes up to 4 GB.
ARG MAX_JOBS=4

USER 0:0
RUN set -eu; \
    apt-get update; \
    apt-get install -y --no-install-recommends 'tini=0.19.*'; \
    rm -rf /var/lib/apt/lists/*; \
    getent group 1000 >/dev/null || groupadd --gid 1000 yaongi; \
    getent passwd 1000 >/dev/null || useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp yaongi; \
    python3 -m venv --system-site-packages --without-pip /opt/yaongi

COPY requirements-trainer.lock requirements-gpu.lock requirements-uv.lock docker/select_requirements.py docker/drop_not_loaded.py /opt/yaongi/
WORKDIR /opt/yaongi
# The large layer: torch, where the base has none, and everything else by hash. The second installation compiles kernels
# of which there are only sources; without FORCE_BUILD their setup would download a program that no hash covers.
RUN set -eu; \
    if [ "$CPU_ONLY" = 1 ]; then lock=trainer flags=--cpu-only; else lock=gpu flags=; fi; \
    python3 select_requirements.py "requirements-$lock.lock" $flags > requirements.txt; \
    python3 select_requirements.py "requirements-$lock.lock" --compiled > compiled.txt; \
    PIP_CONSTRAINT='' python3 -m pip install --no-cache-dir --no-deps --require-hashes --target /tmp/uv -r requirements-uv.lock; \
    /tmp/uv/bin/uv pip install --python bin/python --system-certs --no-cache --compile-bytecode --no-deps --require-hashes \
        -r requirements.txt; \
    if [ -s compiled.txt ]; then \
        export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch; \
        /tmp/uv/bin/uv pip install --python bin/python --system-certs --no-cache --compile-bytecode --no-deps \
            --require-hashes --no-build-isolation -r compiled.txt; \
    fi; \
    if [ "$CPU_ONLY" = 1 ]; then bin/python drop_not_loaded.py; fi; \
    rm -r /tmp/uv

COPY docker/entry.sh /usr/local/bin/entry
COPY docker/check_torch.py /opt/yaongi/
COPY --from=wheel /wheel /opt/yaongi/wheel
# A volume without content of its own takes the owner of the folder over which it is mounted.
RUN python3 -m pip --python /opt/yaongi/bin/python install --no-cache-dir --no-deps --no-index /opt/yaongi/wheel/yaongi-*.whl \
    && /opt/yaongi/bin/python /opt/yaongi/check_torch.py \
    && /opt/yaongi/bin/python -c 'import torch, kfp' \
    && /opt/yaongi/bin/yaongi --version \
    && install -d -o 1000 -g 1000 -m 2775 /work

ENV PATH=/opt/yaongi/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# Without these, the base's version would be ours.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="yaongi trainer" \
      org.opencontainers.image.description="The pipeline on a machine with GPUs: yaongi run JOB; on a cluster its workers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/entry"]
CMD ["yaongi", "--version"]

# Runs on GPUs: train, evaluate, export. The large layer (torch and its dependencies) comes first, then the wheel.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE_IMAGE}
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
# uv unpacks and compiles much faster than pip; it is removed afterwards. The second installation compiles kernels of
# which there are only sources; without FORCE_BUILD their setup would download a program that no hash covers.
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
COPY docker/check_torch.py dist/yaongi-*.whl /opt/yaongi/
RUN python3 -m pip --python /opt/yaongi/bin/python install --no-cache-dir --no-deps --no-index /opt/yaongi/yaongi-*.whl \
    && /opt/yaongi/bin/python /opt/yaongi/check_torch.py \
    && /opt/yaongi/bin/python -c 'import torch' \
    && /opt/yaongi/bin/yaongi --version

ENV PATH=/opt/yaongi/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# docker/build.sh adds version, revision, time, source and base.
LABEL org.opencontainers.image.title="yaongi trainer" \
      org.opencontainers.image.description="Trains, evaluates and exports: python -m trainer.entrypoint" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/entry"]
CMD ["yaongi", "--version"]

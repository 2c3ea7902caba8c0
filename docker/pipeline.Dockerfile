# Runs the pipeline's steps: plan, download, tokenizer, shards, launch. Small, without torch.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

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
COPY dist/yaongi-*.whl /opt/yaongi/
RUN python3 -m pip --python /opt/yaongi/bin/python install --no-cache-dir --no-deps --no-index /opt/yaongi/yaongi-*.whl \
    && /opt/yaongi/bin/python -c 'import kfp, kubernetes; print("kfp", kfp.__version__)' \
    && /opt/yaongi/bin/yaongi --version

ENV PATH=/opt/yaongi/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/tmp/cache/huggingface \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# docker/build.sh adds version, revision, time, source and base.
LABEL org.opencontainers.image.title="yaongi pipeline" \
      org.opencontainers.image.description="Runs the pipeline's steps: yaongi run JOB, or as the image of its KFP components" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/entry"]
CMD ["yaongi", "--version"]

# Trains by Megatron-LM (train.engine megatron): the trainer's image, with Megatron-LM and its data helpers beside it.
# Transformer Engine, APEX and NCCL are those of the NGC image on which the trainer's was built.
ARG BASE_IMAGE=localhost/yaongi-trainer:0.1.0
FROM ${BASE_IMAGE}
# Tag core_v0.12.3. A commit's name is the digest of its content. Newer ones up to core_v0.16.1 have all our arguments.
ARG MEGATRON_COMMIT=3ea68ad6042cc1204386ae9364358f7c4de1bc37
ARG MEGATRON_REPOSITORY=https://github.com/NVIDIA/Megatron-LM.git

USER 0:0
WORKDIR /opt/megatron-lm
# Megatron compiles its helpers at the start of a training, which a read-only file system allows only if they are there.
RUN set -eu; \
    git init --quiet .; \
    git fetch --quiet --depth 1 "$MEGATRON_REPOSITORY" "$MEGATRON_COMMIT"; \
    git checkout --quiet FETCH_HEAD; \
    test "$(git rev-parse HEAD)" = "$MEGATRON_COMMIT"; \
    rm -rf .git docs examples images tests; \
    make -C megatron/core/datasets

ENV PYTHONPATH=/opt/megatron-lm
COPY docker/check_megatron.py /opt/yaongi/
RUN python /opt/yaongi/check_megatron.py

# docker/build.sh adds version, revision, time, source and base.
LABEL org.opencontainers.image.title="yaongi trainer with Megatron-LM" \
      org.opencontainers.image.description="Trains by Megatron-LM, evaluates and exports: python -m trainer.entrypoint" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/entry"]
CMD ["yaongi", "--version"]

"""Whether a Megatron-LM takes our arguments: `python check_megatron.py`, with Megatron-LM on PYTHONPATH.

Its own parser and its own checks (validate_args) get the arguments of several jobs, as rank 0 of their ranks. Where its
configuration classes can be made without a GPU (Transformer Engine installed), they are. The image of
docker/megatron.Dockerfile is built only if that works, so that a newer release by build argument is not found lacking
on the cluster.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

CHANGES: dict[str, dict[str, Any]] = {
    "the preset": {},
    "full recomputation, cosine": {
        "runtime": {"activation_checkpointing": "full"},
        "schedule": {"name": "cosine"},
        "evaluate": {"every_steps": 100},
    },
    "selective recomputation, constant rate": {
        "runtime": {"activation_checkpointing": "selective"},
        "schedule": {"name": "constant"},
        "checkpoint": {"asynchronous": False},
    },
    "interleaved pipeline, context parallel": {
        "megatron": {"tensor_parallel": 2, "context_parallel": 2, "virtual_pipeline": 4},
    },
    "delayed scaling, begun with a model": {
        "precision": {"fp8": {"recipe": "delayed", "bf16_end_layers": 0}},
        "init_from": "/models/qwen3",
    },
    "sigmoid scores with a bias": {
        "model": {
            "moe": {"scores": "sigmoid", "bias_update_rate": 1e-3, "score_scale": 2.5, "shared_width": 768},
        },
    },
    "dense": {
        "model": {"layers": ["*-"] * 48, "moe": None, "mlp": {"width": 6144, "activation": "swiglu"}},
        "megatron": {"expert_parallel": 1},
    },
}


def main() -> int:
    import torch

    from manifests.spec import load_job
    from trainer.megatron.arguments import arguments
    from trainer.megatron.check import check

    # An H100 in name: validate_args asks for the GPU's generation, and there is none where images are built.
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]  # as said
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0)  # type: ignore[assignment]  # too
    os.environ |= {"RANK": "0", "WORLD_SIZE": "16", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    from megatron.training.arguments import (  # type: ignore[import-not-found]  # only in its image
        core_transformer_config_from_args,
        parse_args,
        validate_args,
    )

    importlib.import_module("megatron.core.dist_checkpointing.strategies.torch")  # and what checkpoints need
    importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    base = load_job("qwen3-30b-a3b-megatron").train_spec()
    made = importlib.util.find_spec("transformer_engine") is not None
    for name, changes in CHANGES.items():
        spec = base.updated(changes)
        mesh = check(spec, 16)
        sys.argv = ["pretrain_gpt.py", *arguments(spec, mesh, "fp8")]
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            read = validate_args(parse_args())
            if made:
                core_transformer_config_from_args(read)
        assert read.data_parallel_size == mesh.data, f"{name}: {read.data_parallel_size} data parallel ranks"
        assert read.global_batch_size * spec.tokens.seq_len == spec.batch.tokens_per_step, name
    print(
        f"Megatron takes the arguments of {len(CHANGES)} jobs{', and so do its configuration classes' if made else ''}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

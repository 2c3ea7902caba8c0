"""Stands in for Megatron-LM's program where there is no GPU: its arguments and its lines, around megatron-core itself.

Rendezvous, groups of ranks, token files and data sets, model, gradient buckets, optimizer and checkpoints are those of
core, on CPUs, over gloo and in FP32 (tests/peers/megatron_rank.py, which lies beside this file in the pods).
"""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

import megatron_rank
import torch.distributed as dist


def has(name: str) -> bool:
    return name in sys.argv


def value(name: str, default: str = "0") -> str:
    return sys.argv[sys.argv.index(name) + 1] if has(name) else default


def model() -> dict[str, Any]:
    attention = {
        "num_heads": int(value("--num-attention-heads")),
        "num_kv_heads": int(value("--num-query-groups")),
        "head_dim": int(value("--kv-channels")),
        "rope_theta": float(value("--rotary-base")),
        "qk_norm": has("--qk-layernorm"),
        "bias": not has("--disable-bias-linear"),
    }
    moe = {
        "num_experts": int(value("--num-experts")),
        "expert_width": int(value("--moe-ffn-hidden-size")),
        "top_k": int(value("--moe-router-topk")),
        "scores": value("--moe-router-score-function", "softmax"),
        "score_scale": float(value("--moe-router-topk-scaling-factor", "1")),
        "bias_update_rate": float(value("--moe-router-bias-update-rate")),
        "shared_width": int(value("--moe-shared-expert-intermediate-size")),
    }
    layers = ["*E" if kind else "*-" for kind in json.loads(value("--moe-layer-freq"))]
    shared = {"norm_eps": float(value("--norm-epsilon")), "hidden": int(value("--hidden-size"))}
    tied = not has("--untie-embeddings-and-output-weights")
    return {"layers": layers, "attention": attention, "moe": moe, "tied_embedding": tied, **shared}


def main() -> None:
    assert dist.is_initialized(), "Megatron uses the group that is there"
    steps, rows = int(value("--train-iters")), int(value("--global-batch-size"))
    blend = json.loads(Path(value("--per-split-data-args-path")).read_text())["train"]
    settings = Namespace(
        model=model(),
        tensor=int(value("--tensor-model-parallel-size", "1")),
        expert=int(value("--expert-model-parallel-size", "1")),
        padded=int(value("--vocab-size")) + 1,
        rows=rows,
        seq_len=int(value("--seq-length")),
        seed=int(value("--seed", "1234")),
        balance=float(value("--moe-aux-loss-coeff")),
        numbered=True,
        load="",
        rate=float(value("--lr")),
        steps=steps,
        stop=steps,
        shards=blend[1::2],
        weights=[float(weight) for weight in blend[::2]],
        cache=value("--data-cache-path"),
        run=value("--save"),
        out="",
    )
    began = time.monotonic()

    def told(step: int, loss: float) -> None:
        nonlocal began
        if math.isnan(loss):
            if dist.get_rank() == 0:
                print(f"  successfully saved checkpoint from iteration {step:7d} to {settings.run}", flush=True)
        elif dist.get_rank() == dist.get_world_size() - 1:
            print(
                f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {step:8d}/{steps:8d} | consumed samples: "
                f"{step * rows:12d} | elapsed time per iteration (ms): {1000 * (time.monotonic() - began):.1f} | "
                f"learning rate: {settings.rate:.6E} | global batch size: {rows:5d} | lm loss: {loss:.6E} | loss "
                f"scale: 1.0 | grad norm: 1.000 | number of skipped iterations: {0:3d} | number of nan iterations: "
                f"{0:3d} |",
                flush=True,
            )
        began = time.monotonic()

    with megatron_rank.OnCpu():
        megatron_rank.prepare()
        megatron_rank.split(settings)
        megatron_rank.train(settings, told)


if __name__ == "__main__":
    main()

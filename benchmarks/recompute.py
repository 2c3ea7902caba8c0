"""What each policy of activation checkpointing keeps and costs on a CPU, beside keeping everything.

    OMP_NUM_THREADS=1 python benchmarks/recompute.py [--preset small] [--rows 4]

Kept: bytes that autograd holds after the forward pass, measured, and their share by arithmetic. Time: a forward and
backward pass, the median of several, all policies in turn, as a ratio to `none`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from manifests.spec import load_job
from trainer.arithmetic.activations import activations
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.recomputing import set_policy
from trainer.runtimespec import RecomputeSpec, Recomputing

POLICIES: tuple[Recomputing, ...] = (
    "none",
    "selective",
    RecomputeSpec(every=3),
    RecomputeSpec(every=2),
    "sqrt",
    "full",
)


def forward(model: HybridModel, rows: int, length: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, model.spec.vocab_size, (rows, length), generator=generator)
    return model(ids_BT, torch.zeros(rows, length, dtype=torch.int32), ids_BT)


def kept_bytes(model: HybridModel, rows: int, length: int) -> int:
    """Of all storages that autograd holds, but for the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(model, rows, length)
    kept = sum(storages.values())
    del output
    return kept


def seconds(model: HybridModel, rows: int, length: int) -> float:
    model.zero_grad()
    began = time.perf_counter()
    output = forward(model, rows, length)
    (output.ce_sum / (rows * length) + output.aux_sum).backward()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    job = load_job(arguments.preset)
    spec: ModelSpec = job.train.model.updated(
        {"engram": [e.model_dump() | {"compress_tokens": False} for e in job.train.model.engram]}
    )
    length, rows = job.train.seq_len, arguments.rows
    model = build_model(spec, seed=0)
    times: dict[str, list[float]] = {str(policy): [] for policy in POLICIES}
    for number in range(arguments.repeats + 1):  # the first is not counted
        for policy in POLICIES:
            set_policy(model, policy)
            taken = seconds(model, rows, length)
            if number:
                times[str(policy)].append(taken)
    first: tuple[float, float] | None = None
    print(f"{arguments.preset}, {rows} rows of {length} tokens, FP32")
    print("| policy | kept | of `none` | by arithmetic | time |\n|---|---|---|---|---|")
    for policy in POLICIES:
        set_policy(model, policy)
        kept, taken = kept_bytes(model, rows, length), statistics.median(times[str(policy)])
        first = first or (kept, taken)
        counted = activations(spec, length, policy, "fp32").kept / activations(spec, length, "none", "fp32").kept
        print(f"| {policy} | {kept / 1e6:.0f} MB | {kept / first[0]:.0%} | {counted:.0%} | × {taken / first[1]:.2f} |")


if __name__ == "__main__":
    main()

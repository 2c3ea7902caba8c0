"""A training step with LoRA against full training, on a CPU: time, FLOPs, gradients and optimizer state.

    OMP_NUM_THREADS=1 python benchmarks/lora.py [--rounds 6] [--rank 16]

Both use AdamW. Steps (forward, backward, update) alternate between the two, and the best time of each counts: with one
thread the CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.memory import training_memory
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.optim import build_optimizers
from trainer.spec import OptimizerSpec

ROWS, LENGTH = 2, 512
DENSE = ModelSpec(
    vocab_size=4096,
    hidden=512,
    layers=["*-"] * 4,
    attention={"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "rope_theta": 1e6},
    mlp={"width": 1536, "activation": "swiglu"},
)
EXPERTS = DENSE.updated(
    {"layers": ["*E"] * 4, "moe": {"num_experts": 16, "top_k": 4, "expert_width": 256, "activation": "swiglu"}}
)
ADAMW = OptimizerSpec(name="adamw")
ATTENTION = {"targets": {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}}


class Steps:
    """Steps of one model on one micro-batch."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.best = spec, float("inf")
        self.model = build_model(spec, seed=0)
        self.optimizers = build_optimizers(self.model, ADAMW, spec)
        self.ids_BT = torch.randint(0, spec.vocab_size, (ROWS, LENGTH))
        self.seq_idx_BT = torch.zeros(ROWS, LENGTH, dtype=torch.int32)

    def once(self) -> None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        output = self.model(self.ids_BT, self.seq_idx_BT, self.ids_BT.roll(-1, dims=1))
        ((output.ce_sum + output.aux_sum) / self.ids_BT.numel()).backward()
        self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.optimizers.step()
        self.optimizers.zero_grad()
        self.best = min(self.best, clock() - began)

    def state(self) -> int:
        return sum(tensor.nbytes for tensor in self.optimizers.state_dict().values())


def compare(name: str, spec: ModelSpec, lora: dict[str, Any], rounds: int) -> None:
    full, adapters = Steps(spec), Steps(spec.updated({"lora": lora}))
    for _ in range(rounds):
        full.once()
        adapters.once()
    operations = flops_per_token(adapters.spec, LENGTH) / flops_per_token(spec, LENGTH)
    for steps in (full, adapters):
        memory = training_memory(steps.spec, ADAMW)
        assert memory.gradients == steps.gradients and abs(memory.optimizer / steps.state() - 1) < 0.01
    print(
        f"{name:20} step {full.best * 1e3:7.0f} → {adapters.best * 1e3:7.0f} ms ({adapters.best / full.best:.2f}, by "
        f"operations {operations:.2f}); gradients {full.gradients / 2**20:.1f} → {adapters.gradients / 2**20:.1f} MiB; "
        f"optimizer state {full.state() / 2**20:.1f} → {adapters.state() / 2**20:.1f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    rank = {"rank": arguments.rank}
    compare("dense", DENSE, rank, arguments.rounds)
    compare("experts", EXPERTS, rank, arguments.rounds)
    compare("experts, attention", EXPERTS, rank | ATTENTION, arguments.rounds)


if __name__ == "__main__":
    main()

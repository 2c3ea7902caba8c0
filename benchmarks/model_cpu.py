"""Training throughput on CPU: our model against transformers' NemotronH, same shapes, same run.

    OMP_NUM_THREADS=1 python benchmarks/model_cpu.py [--part all] [--rows 4] [--length 1024] [--repeats 3]

Seven layers (M E M * E M E), hidden 512, 64 experts. Both run forward and backward in turns, the best time of each
counts (with one thread its CPU time, which other processes disturb less), and a matrix product timed between the turns
gives the peak that this machine had meanwhile. Part `ssm` times
a Mamba-2 mixer on rows of 256 to 16,384 tokens, as many tokens each time: its cost for each token must not depend on
the length.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from trainer.arithmetic.flops import flops_per_token
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.ops.wide import computed_in

SPEC = ModelSpec(
    vocab_size=4096,
    hidden=512,
    layers=["M", "E", "M", "*", "E", "M", "E"],
    mamba={"num_heads": 16, "head_dim": 64, "d_state": 64, "num_groups": 1, "chunk_size": 128},
    attention={"num_heads": 8, "num_kv_heads": 2, "head_dim": 64},
    moe={"num_experts": 64, "top_k": 6, "expert_width": 256},
)
GOALS = {"fp32": 1.4, "bf16": 1.5}
LENGTHS = (256, 1024, 4096, 16384)
BAND = 1.35  # longest over shortest time; the differences are caches and the noise of the machine
THEIR_NAMES = {"M": "linear_attention", "E": "moe", "*": "full_attention"}


def nemotron() -> NemotronHForCausalLM:
    """The same shapes; its shared expert, which it always has, is made one channel wide."""
    mamba, attention, moe = SPEC.mamba, SPEC.attention, SPEC.moe
    return NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=SPEC.vocab_size,
            hidden_size=SPEC.hidden,
            layers_block_type=[THEIR_NAMES[layer] for layer in SPEC.layers],
            mamba_num_heads=mamba.num_heads,
            mamba_head_dim=mamba.head_dim,
            ssm_state_size=mamba.d_state,
            n_groups=mamba.num_groups,
            chunk_size=mamba.chunk_size,
            num_attention_heads=attention.num_heads,
            num_key_value_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            n_routed_experts=moe.num_experts,
            num_experts_per_tok=moe.top_k,
            moe_intermediate_size=moe.expert_width,
            moe_shared_expert_intermediate_size=1,
            routed_scaling_factor=moe.score_scale,
            use_cache=False,
        )
    )


def best_times(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The best time of each; they take turns, so that all meet the same neighbours on the machine."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # several threads wait in loops
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up and can hardly be the best
        for name, run in candidates.items():
            started = clock()
            run()
            best[name] = min(best[name], clock() - started)
    return best


def compare(rows: int, length: int, repeats: int, dtype: torch.dtype) -> None:
    """Both models, forward and backward, under autocast if `dtype` is bfloat16."""
    torch.manual_seed(0)
    ids_BT = torch.randint(0, SPEC.vocab_size, (rows, length))
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((rows, 1), -100)], dim=1)
    seq_idx_BT = torch.zeros_like(ids_BT, dtype=torch.int32)
    ours, theirs = build_model(SPEC, seed=0, dtype=dtype), nemotron()
    fastest = computed_in(dtype, ids_BT.device)
    left, right = torch.randn(1024, 1024, dtype=fastest), torch.randn(1024, 1024, dtype=fastest)

    def train(loss: Callable[[], Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()

    best = best_times(
        {
            "yaongi": lambda: train(lambda: ours(ids_BT, seq_idx_BT, labels_BT).ce_sum),
            "transformers": lambda: train(lambda: theirs(ids_BT, labels=ids_BT).loss),
            "matrix product": lambda: left @ right,
        },
        repeats,
    )
    tokens, peak = ids_BT.numel(), 2 * 1024**3 / best["matrix product"]
    flops = flops_per_token(SPEC, length) * tokens
    name_of = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    print(f"{name_of}, {torch.get_num_threads()} thread(s), {tokens} tokens, peak {peak / 1e9:.1f} GFLOP/s (1024³)")
    for name in ("yaongi", "transformers"):
        print(f"{name:14}{tokens / best[name]:9.0f} tokens/s  {flops / best[name] / peak:6.1%} of the peak")
    print(f"ratio {best['transformers'] / best['yaongi']:.2f} (goal {GOALS[name_of]})")


def flatness(repeats: int) -> None:
    """Cost of a Mamba-2 mixer for each token, by length of the row. Exits with 1 where it leaves the band."""
    sublayer = build_model(SPEC.updated({"layers": ["M"]}), seed=0).layers[0][0]

    def run(length: int) -> Callable[[], object]:
        x_BTD = torch.randn(LENGTHS[-1] // length, length, SPEC.hidden, requires_grad=True)
        documents = Documents.one_per_row(*x_BTD.shape[:2])
        return lambda: sublayer(x_BTD, x_BTD, documents).sum().backward()

    best = best_times({str(length): run(length) for length in LENGTHS}, repeats)
    print("Mamba-2 mixer, µs for each token by length:", end="")
    for length, spent in best.items():
        print(f"  {length}: {spent / LENGTHS[-1] * 1e6:.1f}", end="")
    spread = max(best.values()) / min(best.values())
    print(f"\nlongest over shortest time {spread:.2f} (at most {BAND})")
    if spread > BAND:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["fp32", "bf16", "ssm", "all"], default="all")
    arguments = parser.parse_args()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if arguments.part in (name, "all"):
            compare(arguments.rows, arguments.length, arguments.repeats, dtype)
    if arguments.part in ("ssm", "all"):
        flatness(arguments.repeats)


if __name__ == "__main__":
    main()

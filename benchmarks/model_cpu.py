"""Training throughput on CPU: our model against transformers' NemotronH, same shapes, same run.

    OMP_NUM_THREADS=1 python benchmarks/model_cpu.py [--rows 2] [--length 512] [--repeats 3]

Seven layers (M E M * E M E), hidden 512, 64 experts. Both run forward and backward in turns, the best time of each
counts, and a matrix product timed between the turns gives the peak that this machine had meanwhile.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from trainer.flops import flops_per_token
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec

SPEC = ModelSpec(
    vocab_size=4096,
    hidden=512,
    layers=["M", "E", "M", "*", "E", "M", "E"],
    mamba={"num_heads": 16, "head_dim": 64, "d_state": 64, "num_groups": 1, "chunk_size": 128},
    attention={"num_heads": 8, "num_kv_heads": 2, "head_dim": 64},
    moe={"num_experts": 64, "top_k": 6, "expert_width": 256},
)
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


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    ids_BT = torch.randint(0, SPEC.vocab_size, (arguments.rows, arguments.length))
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((arguments.rows, 1), -100)], dim=1)
    seq_idx_BT = torch.zeros_like(ids_BT, dtype=torch.int32)
    ours, theirs = build_model(SPEC, seed=0), nemotron()
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    candidates = {
        "yaongi": lambda: ours(ids_BT, seq_idx_BT, labels_BT).ce_sum.backward(),
        "transformers": lambda: theirs(ids_BT, labels=ids_BT).loss.backward(),
        "matrix product": lambda: left @ right,
    }
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(arguments.repeats + 1):  # the first round warms up and can hardly be the best
        for name, run in candidates.items():
            best[name] = min(best[name], seconds(run))

    tokens, peak = ids_BT.numel(), 2 * 1024**3 / best["matrix product"]
    flops = flops_per_token(SPEC, arguments.length) * tokens
    print(f"{torch.get_num_threads()} thread(s), {tokens} tokens, peak {peak / 1e9:.1f} GFLOP/s (1024³, fp32)")
    for name in ("yaongi", "transformers"):
        rate = tokens / best[name]
        print(f"{name:14}{rate:9.0f} tokens/s  {flops / best[name] / peak:6.1%} of the peak")
    print(f"ratio {best['transformers'] / best['yaongi']:.2f}")


if __name__ == "__main__":
    main()

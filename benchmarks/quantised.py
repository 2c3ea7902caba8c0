"""Greedy generation with weights in INT8, FP8 and BF16 against FP32: the same weights, prompt and process, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/quantised.py [--prompt 128] [--tokens 64] [--rounds 3]

Prints bytes in memory, tokens per second after the prompt and tokens per second of the prompt, each with its ratio to
FP32. Rounds alternate between the kinds; the median of each counts. With one thread, CPU time is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from trainer.export import assemble
from trainer.inference.engine import Engine
from trainer.inference.sampling import Sampling
from trainer.loading import cast
from trainer.model.hybrid import HybridModel, build_model
from trainer.model.quantised import quantised_state
from trainer.modelspec import ModelSpec

# 135M parameters, of which a token uses 81M: more than fits into caches.
SPEC = ModelSpec(
    vocab_size=16384,
    hidden=1024,
    layers=list("MEM*-MEM*-"),
    mamba={"num_heads": 32, "head_dim": 64, "d_state": 128},
    attention={"num_heads": 16, "num_kv_heads": 4, "head_dim": 64},
    moe={"num_experts": 16, "top_k": 4, "expert_width": 768, "shared_width": 768},
    mlp={"width": 4096},
)


def models() -> dict[str, HybridModel]:
    plain, path = build_model(SPEC, seed=0).eval(), Path("made")
    found = {"fp32": plain}
    for kind in ("int8", "fp8"):
        found[kind] = assemble(path, SPEC, quantised_state(SPEC, plain.state_dict(), kind), "cpu", kind=kind)
    state = cast(plain.state_dict(), torch.bfloat16)
    return found | {"bf16": assemble(path, SPEC, state, "cpu", stream=torch.bfloat16)}


def timed(model: HybridModel, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of the tokens after it."""
    engine = Engine(model, rows=1, length=len(prompt) + tokens)
    engine.submit(prompt, Sampling(max_tokens=tokens))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    engine.step()
    read = clock()
    engine.run()
    return read - began, clock() - read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prompt = torch.randint(1, SPEC.vocab_size, (options.prompt,)).tolist()
    made = models()
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in made}
    for round_ in range(options.rounds + 1):
        for kind, model in made.items():
            found = timed(model, prompt, options.tokens)
            if round_:  # the first one warms up
                times[kind].append(found)
    medians = {kind: [statistics.median(part) for part in zip(*found, strict=True)] for kind, found in times.items()}
    for kind, model in made.items():
        size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        (read, wrote), (read_fp32, wrote_fp32) = medians[kind], medians["fp32"]
        print(
            f"{kind}: {size / 2**20:,.0f} MiB; batch 1 {(options.tokens - 1) / wrote:,.1f} tokens/s, ratio "
            f"{wrote_fp32 / wrote:.2f}; prompt {options.prompt / read:,.0f} tokens/s, ratio {read_fp32 / read:.2f}"
        )


if __name__ == "__main__":
    main()

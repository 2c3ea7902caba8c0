"""Greedy generation against transformers' NemotronH with its cache: the same weights, prompts and process, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [--prompt 128] [--tokens 256] [--rounds 3] [--check]

Prints tokens per second (prompt read and tokens written), the ratio for one prompt and for eight, and whether the texts
are the same. Rounds alternate between the two; the median of each counts, with one thread that of the CPU time, which
other processes disturb less. `--check` fails if a ratio of the narrow model is below 2. In the wide one most of the
time goes into products of the same matrices, whose weights both have to read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from trainer.generate import generate
from trainer.hf.architectures import native
from trainer.hf.weights import tensors
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec

WANTED = 2.0
# Nemotron's layout, one mixer in each layer; the narrow one has the widths of the preset tiny, the wide one 60M
# parameters.
NARROW = ModelSpec(
    vocab_size=4096,
    hidden=128,
    layers=list("MEME*-MEMEME*-ME"),
    mamba={"num_heads": 4, "head_dim": 32, "d_state": 32},
    attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    moe={"num_experts": 8, "top_k": 2, "expert_width": 128},
    mlp={"width": 256},
)
WIDE = NARROW.updated(
    {
        "vocab_size": 8192,
        "hidden": 512,
        "mamba": {"num_heads": 16, "head_dim": 64, "d_state": 128},
        "attention": {"num_heads": 8, "head_dim": 64},
        "moe": {"num_experts": 32, "top_k": 4, "expert_width": 256},
        "mlp": {"width": 1024},
    }
)
MODELS = {"narrow": NARROW, "wide": WIDE}


def theirs(ours: HybridModel) -> transformers.PreTrainedModel:
    """NemotronH with the weights of our model."""
    architecture, why_not = native(ours.spec)
    assert architecture is not None, why_not
    with tempfile.TemporaryDirectory() as folder:
        weights = dict(tensors(architecture, ours.spec, ours.state_dict(), torch.float32))
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        Path(folder, "config.json").write_text(json.dumps(architecture.config(ours.spec, 4096)))
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def timed(function: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    function()
    return clock() - began


def compare(name: str, rows: int, options: argparse.Namespace) -> float:
    """Print a line, and return the ratio."""
    ours = build_model(MODELS[name], seed=0).eval()
    with torch.no_grad():  # far from ties between tokens
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    peer = theirs(ours)
    ids_BT = torch.randint(1, ours.spec.vocab_size, (rows, options.prompt))
    made: dict[str, list[list[int]]] = {}

    def run_ours() -> None:
        made["ours"] = generate(ours, ids_BT.tolist(), max_tokens=options.tokens, temperature=0, seed=0, stops=[])

    def run_theirs() -> None:
        lengths = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
        mask_BT = torch.ones_like(ids_BT)
        with torch.inference_mode():
            out = peer.generate(
                ids_BT, attention_mask=mask_BT, do_sample=False, use_cache=True, pad_token_id=0, **lengths
            )
        made["theirs"] = out[:, options.prompt :].tolist()

    run_ours()
    times = [(timed(run_ours), timed(run_theirs)) for _ in range(options.rounds)]
    mine, other = (statistics.median(each) for each in zip(*times, strict=True))
    written = rows * options.tokens
    print(
        f"{name}, batch {rows}: ours {written / mine:,.0f} tokens/s, transformers {transformers.__version__} "
        f"{written / other:,.0f} tokens/s, ratio {other / mine:.2f}; same tokens: {made['ours'] == made['theirs']}",
        flush=True,
    )
    return other / mine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ratios = {name: [compare(name, rows, options) for rows in (1, 8)] for name in options.models}
    if options.check and min(ratios.get("narrow", [WANTED])) < WANTED:
        sys.exit(f"a ratio is below {WANTED}")


if __name__ == "__main__":
    main()

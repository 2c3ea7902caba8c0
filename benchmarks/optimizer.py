"""One step of our Muon against torch.optim.Muon, on the matrices of h100-4b with every width divided by four.

    OMP_NUM_THREADS=1 python benchmarks/optimizer.py [--layers 7] [--repeats 5]

Both get the same matrices, gradients, coefficients and number of steps. torch.optim.Muon accepts only 2-D parameters,
so each expert, head and block is a separate parameter there. It iterates in bfloat16, which CPUs without hardware
support emulate slowly. To compare in the same precision, its code also runs with `Tensor.bfloat16` replaced by
`Tensor.float`; that ratio is the meaningful one. Steps alternate, and the lowest CPU time over all threads counts,
because other processes can only make a step slower.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from manifests.spec import load_job
from trainer.modelspec import ModelSpec
from trainer.optim.muon import Muon
from trainer.optim.rules import Assignment, assign
from trainer.parameters import parameters
from trainer.spec import OptimizerSpec

COMMON = {"lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1}


def quarter(layers: int) -> ModelSpec:
    """The first layers of h100-4b with every width divided by four and the same numbers of heads and experts."""
    full = load_job("h100-4b").train.model
    spec = full.model_dump()
    spec["layers"] = full.layers[:layers]
    for section, name in [
        ("mamba", "head_dim"),
        ("mamba", "d_state"),
        ("attention", "head_dim"),
        ("moe", "expert_width"),
        ("mlp", "width"),
    ]:
        spec[section][name] //= 4
    spec["hidden"] //= 4
    engram = [entry for entry in spec["engram"] if entry["layer"] < layers]
    spec["engram"] = [
        {**entry, "rows_per_head": 10, "width_per_order": entry["width_per_order"] // 4} for entry in engram
    ]
    return ModelSpec.model_validate(spec)


def split(entry: Assignment, tensor: Tensor) -> list[Tensor]:
    """The matrices in a stored parameter."""
    return list(tensor) if tensor.dim() == 3 else list(tensor.split(entry.block_rows or (tensor.shape[0],)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=7, help="of the 52")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-bf16", action="store_true", help="leave out torch.optim.Muon as it is")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    spec = quarter(arguments.layers)
    table = assign([(p.name, p.shape) for p in parameters(spec)], OptimizerSpec(), spec)
    table = [entry for entry in table if entry.optimizer == "muon"]
    stored = [nn.Parameter(torch.randn(entry.shape)) for entry in table]
    gradients = [torch.randn(entry.shape) for entry in table]
    start = [parameter.detach().clone() for parameter in stored]
    for parameter, gradient in zip(stored, gradients, strict=True):
        parameter.grad = gradient
    ours = Muon(
        [{"params": stored, "block_rows": [entry.block_rows for entry in table]}],
        coefficients="newton_schulz",
        **COMMON,
    )

    def theirs() -> tuple[torch.optim.Muon, list[nn.Parameter]]:
        matrices = []
        for entry, weight, gradient in zip(table, start, gradients, strict=True):
            for w, g in zip(split(entry, weight), split(entry, gradient), strict=True):
                matrices.append(nn.Parameter(w.clone()))
                matrices[-1].grad = g
        return torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **COMMON), matrices

    wide, wide_matrices = theirs()

    def wide_step() -> None:
        with mock.patch.object(Tensor, "bfloat16", Tensor.float):
            wide.step()

    steps: dict[str, Callable[[], object]] = {"yaongi": ours.step, "torch.optim.Muon in float32": wide_step}
    if not arguments.skip_bf16:
        steps["torch.optim.Muon as it is"] = theirs()[0].step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)

    apart = [m for entry, weight in zip(table, stored, strict=True) for m in split(entry, weight.detach())]
    before = [m for entry, weight in zip(table, start, strict=True) for m in split(entry, weight)]
    worst = max(
        float((a - b).norm() / (b - s).norm())
        for a, b, s in zip(apart, [m.detach() for m in wide_matrices], before, strict=True)
    )
    count = sum(parameter.numel() for parameter in stored)
    print(f"{len(apart)} matrices, {count / 1e6:.1f}M elements, {torch.get_num_threads()} threads")
    for name, times in seconds.items():
        print(f"{name:28} {min(times):8.3f} CPU s/step  median {statistics.median(times):.3f}")
    mine = min(seconds["yaongi"])
    for name in list(steps)[1:]:
        print(f"ratio to {name}: {min(seconds[name]) / mine:.2f}", flush=True)
    print(f"updates of {arguments.repeats} steps differ by at most {worst:.1e} of their size in float32")
    assert worst < 1e-3, "both must have done the same work"


if __name__ == "__main__":
    main()

"""One step of our Muon against torch.optim.Muon, on the matrices of h100-4b with every width divided by four.

    OMP_NUM_THREADS=1 python benchmarks/optimizer.py [--layers 7] [--repeats 5]

Both get the same matrices, gradients, coefficients and number of steps. torch.optim.Muon accepts only 2-D parameters,
so each expert, head and block is a separate parameter there. It iterates in bfloat16, which CPUs without hardware
support emulate slowly. To compare in the same precision, its code also runs with `Tensor.bfloat16` replaced by
`Tensor.float`; that ratio is the meaningful one. Steps alternate, and the lowest CPU time over all threads counts,
because other processes can only make a step slower.

    OMP_NUM_THREADS=1 python benchmarks/optimizer.py --exchanges
    python benchmarks/optimizer.py --symmetric

The first: on two ranks of gloo, steps over matrices that are cut between them, with exchanges that overlap as they do
in training and one after the other; the lowest wall time counts. Without a GPU the products and the copies of an
exchange share the processor, so the ratio shows only that overlapping costs nothing. The second, on a GPU with
quack-kernels: symmetric products against torch's, for the shapes of h100-4b.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from manifests.spec import load_job
from trainer.modelspec import ModelSpec
from trainer.ops import Setting, orthogonalise_quack
from trainer.ops.orthogonalise import orthogonalise_
from trainer.optim import muon
from trainer.optim.fastest import milliseconds
from trainer.optim.muon import Muon
from trainer.optim.rules import Assignment, assign
from trainer.optim.shares import Share
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


class Serial(muon._Travelling):
    """One exchange after the other, each trip awaited where it is started."""

    def finish(self) -> None:
        for number, exchange in enumerate(self._exchanges):
            received = (self._send(number) if number else self._outward).arrived()
            updates = exchange.matrices(received, self._like, self._orthogonalise_)
            self._apply(exchange, exchange.to_holders(updates, self._like))


def exchanges(rank: int, ranks: int, file: str, repeats: int, size: int = 512, count: int = 12) -> None:
    """One for each of `count` matrices, of which each rank holds half."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    seconds: dict[str, list[float]] = {"overlapping": [], "one by one": []}
    with mock.patch.object(muon, "MAX_BATCH_ELEMENTS", size * size):
        torch.manual_seed(0)
        stored = [nn.Parameter(torch.randn(size, size)) for _ in range(count)]
        for parameter in stored:
            parameter.grad = torch.randn(size, size)
        ours = Muon([{"params": stored, "shares": [Share(parameter, mesh) for parameter in stored]}], **COMMON)
        for _ in range(1 + repeats):
            for name, travelling in (("overlapping", muon._Travelling), ("one by one", Serial)):
                dist.barrier()
                with mock.patch.object(muon, "_Travelling", travelling):
                    began = time.perf_counter()
                    ours.step()
                    dist.barrier()
                    seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        print(f"{len(ours._work[0].exchanges)} exchanges of {size} x {size} between {ranks} ranks")
        for name, times in seconds.items():
            print(f"{name:28} {min(times[1:]):8.3f} s/step  median {statistics.median(times[1:]):.3f}")
        print(f"ratio to one by one: {min(seconds['one by one'][1:]) / min(seconds['overlapping'][1:]):.2f}")
    dist.destroy_process_group()


def symmetric() -> None:
    """Products of quack against torch's, for each shape of a batch of matrices of h100-4b."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if problem := orthogonalise_quack.unsupported(Setting(device, torch.bfloat16)):
        raise SystemExit(f"symmetric products cannot run here: {problem}")
    model = load_job("h100-4b").train.model
    table = assign([(p.name, p.shape) for p in parameters(model)], OptimizerSpec(), model)
    shapes: dict[tuple[int, int], int] = defaultdict(int)
    for entry in table:
        if entry.optimizer == "muon":
            for rows in entry.block_rows or (entry.shape[-2],):
                shapes[rows, entry.shape[-1]] += math.prod(entry.shape[:-2])
    for (rows, columns), number in shapes.items():
        number = min(number, muon.MAX_BATCH_ELEMENTS // (rows * columns))
        x_Nmn = torch.randn(number, rows, columns, device=device, dtype=torch.bfloat16)
        plain, quack = (
            milliseconds(each, x_Nmn, "polar_express", 5)
            for each in (orthogonalise_, orthogonalise_quack.orthogonalise_quack)
        )
        print(
            f"{number:5} of {rows} x {columns}: torch {plain:.2f} ms  quack {quack:.2f} ms  ratio {plain / quack:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=7, help="of the 52")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-bf16", action="store_true", help="leave out torch.optim.Muon as it is")
    parser.add_argument("--exchanges", action="store_true", help="overlapping exchanges against one after the other")
    parser.add_argument("--symmetric", action="store_true", help="symmetric products against torch's, on a GPU")
    arguments = parser.parse_args()
    if arguments.symmetric:
        symmetric()
        return
    if arguments.exchanges:
        with tempfile.TemporaryDirectory() as directory:
            torch.multiprocessing.spawn(exchanges, (2, f"{directory}/store", arguments.repeats), nprocs=2)
        return

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

"""What expert weights cost beside their products: cast in every pass, copied once for each optimizer step, and with
copies that add gradients themselves (trainer/ops/narrow.py); where they run, with Triton's products that add.

    OMP_NUM_THREADS=1 python benchmarks/experts_step.py [--preset h100-4b] [--divide 4] [--tokens 512]

One layer of experts of the preset, its widths divided by `--divide`, goes forward and backward by the operations of a
GPU (torch's grouped products), on a CPU too. Peer: the FP32 weights, which autocast narrows where they are multiplied.
All see the same tokens in the same process, a few micro-batches for each optimizer step. Bytes are those of the
operations on whole stacks of weights other than products, counted as they run; times are of everything.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manifests.spec import load_job
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.ops import Setting, experts_triton
from trainer.ops.experts import by_expert, compute_dtype
from trainer.ops.experts_grouped import _Experts
from trainer.parameters import parameters
from trainer.spec import BackendsSpec

PASSES = ("aten._to_copy.default", "aten.copy_.default", "aten.add_.Tensor", "aten.add.Tensor", "aten.clone.default")


class Traffic(TorchDispatchMode):
    """Bytes that casts, copies and sums of tensors of some sizes read and write."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.bytes, self._sizes = 0, sizes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if str(function) in PASSES:
            operands = args[1:] if str(function) == "aten.copy_.default" else args
            whole = [t for t in (*tree_leaves(operands), result) if isinstance(t, Tensor) and t.numel() in self._sizes]
            self.bytes += sum(tensor.nbytes for tensor in whole)
        return result


def one_layer(preset: str, divide: int) -> ModelSpec:
    """Its first layer of experts alone, between small embedding and head."""
    model = load_job(preset).train.model
    moe = {**model.moe.model_dump(), "expert_width": model.moe.expert_width // divide, "shared_width": 0}
    changes = {"layers": ["E"], "hidden": model.hidden // divide, "vocab_size": 256, "moe": moe, "engram": []}
    return model.updated({**changes, "mtp": None, "lora": None})


def grouped(x_SD: Tensor, up: Tensor, down: Tensor, expert_SK: Tensor, weight_SK: Tensor, activation: str) -> Tensor:
    """`experts_grouped` as it runs on a GPU."""
    routing = by_expert(expert_SK, up.shape[0])
    ends_E = routing.count_E.cumsum(0).to(torch.int32)
    tokens_SD = x_SD.to(compute_dtype(x_SD))
    return _Experts.apply(tokens_SD, up, down, weight_SK, routing.order_R, routing.place_R, ends_E, activation)


def variants(spec: ModelSpec, device: torch.device) -> Iterator[tuple[str, HybridModel]]:
    names = {p.name for p in parameters(spec) if p.per_expert}
    for title, copied, adding in (
        ("cast in every pass", set(), set()),
        ("copies", names, set()),
        ("copies that add", names, names),
        ("Triton products add", names, names),
    ):
        by_triton = title.startswith("Triton")
        if by_triton and experts_triton.unsupported(Setting(device, torch.bfloat16, spec)):
            continue
        backends = BackendsSpec(experts="triton" if by_triton else "grouped")
        model = build_model(spec, backends, device=device, dtype=torch.bfloat16, seed=0)
        model.keep_copies(copied, adding)
        for moe in model.moe_sublayers() if not by_triton else []:
            moe.run_experts = grouped
        yield title, model


@contextmanager
def measured(device: torch.device, seconds: list[float]) -> Iterator[None]:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    wait()
    began = clock()
    yield
    wait()
    seconds.append(clock() - began)


def step(model: HybridModel, ids_BT: Tensor, micro_batches: int) -> None:
    for _ in range(micro_batches):
        with torch.autocast(ids_BT.device.type, dtype=torch.bfloat16):
            output = model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32), ids_BT.roll(-1, dims=1))
        (output.ce_sum + output.aux_sum).backward()


def end_of_step(model: HybridModel) -> None:
    """As an optimizer leaves the model, without its work."""
    model.zero_grad()
    torch.autograd.graph.increment_version(list(model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="h100-4b")
    parser.add_argument("--divide", type=int, default=4, help="of the preset's widths")
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of an optimizer step")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = one_layer(arguments.preset, arguments.divide)
    ids_BT = torch.randint(0, 256, (1, arguments.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    models = dict(variants(spec, device))
    sizes = {p.count for p in parameters(spec) if p.per_expert}
    weights = sum(p.count for p in parameters(spec) if p.per_expert)
    per_weight, gradients = {}, {}
    for title, model in models.items():
        with Traffic(sizes) as traffic:
            step(model, ids_BT, arguments.micro_batches)
        per_weight[title] = traffic.bytes / arguments.micro_batches / weights
        gradients[title] = [parameter.grad.clone() for parameter in model.parameters()]
        end_of_step(model)
    seconds: dict[str, list[float]] = {title: [] for title in models}
    for _ in range(arguments.repeats):
        for title, model in models.items():
            with measured(device, seconds[title]):
                step(model, ids_BT, arguments.micro_batches)
            end_of_step(model)
    print(
        f"{weights / 1e6:.1f}M weights of experts, {arguments.micro_batches} micro-batches of {arguments.tokens} tokens"
    )
    first = next(iter(models))
    for title in models:
        each = min(seconds[title]) / arguments.micro_batches
        print(f"{title:20} {per_weight[title]:5.1f} bytes a weight, {1e3 * each:8.1f} ms a micro-batch")
    for title in list(models)[1:]:
        ratio = min(seconds[first]) / min(seconds[title])
        print(f"ratio to {first}, {title}: bytes {per_weight[first] / per_weight[title]:.2f}, time {ratio:.2f}")
        same = all(map(torch.equal, gradients[first], gradients[title]))
        assert same or device.type == "cuda", "the same numbers"  # on a GPU, sums of other operations have no order


if __name__ == "__main__":
    main()

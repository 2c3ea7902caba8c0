"""Routed experts forward and backward by each backend that runs here, against torch's grouped products.

    python benchmarks/experts.py [--preset h100-4b] [--tokens 16384] [--divide 1] [--repeats 10]

One call of the operation on random tokens, all backends in one process, the median of the repeats. The last column is
what a kernel that reads its inputs once and writes its results once would move, per second; on a GPU compare it with
the bandwidth. The peer without grouped products is `reference`: one expert after the other, as transformers does it.
`--divide` makes all sides smaller, for a CPU. Triton's kernels run there with TRITON_INTERPRET=1, which times nothing.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from manifests.spec import load_job
from trainer.ops import OPS, Setting
from trainer.ops.check import launchable
from trainer.proof.start import remember


def draw(preset: str, tokens: int, divide: int, setting: Setting) -> tuple[list[Tensor], Tensor, str]:
    """Tokens, weights of experts and of the routing; the choice; the activation."""
    model = load_job(preset).train.model
    hidden, width, moe = model.hidden // divide, model.moe.expert_width // divide, model.moe
    rows = 2 * width if moe.activation == "swiglu" else width
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, hidden), (moe.num_experts, rows, hidden), (moe.num_experts, hidden, width)]
    tensors = [torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    choice = torch.rand(tokens, moe.num_experts, generator=generator).topk(moe.top_k).indices
    weight = torch.rand(tokens, moe.top_k, generator=generator)
    leaves = [tensor.to(setting.device, setting.dtype) for tensor in tensors] + [weight.to(setting.device)]
    return [leaf.requires_grad_() for leaf in leaves], choice.to(setting.device), moe.activation


def seconds(name: str, leaves: list[Tensor], choice: Tensor, activation: str, repeats: int) -> float:
    """The median of a call forward and backward, after two that warm up."""
    function = OPS["experts"].backends[name].function
    wait = torch.cuda.synchronize if choice.is_cuda else lambda: None
    gradient = torch.ones_like(leaves[0])
    took = []
    for _ in range(repeats + 2):
        wait()
        began = time.perf_counter()
        y_SD = function(*leaves[:3], choice, leaves[3], activation)
        torch.autograd.grad(y_SD, leaves, gradient)
        wait()
        took.append(time.perf_counter() - began)
    return statistics.median(took[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="h100-4b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--divide", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    setting = Setting(torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32)
    remember(setting.device)
    leaves, choice, activation = draw(arguments.preset, arguments.tokens, arguments.divide, setting)
    took, absent = {}, {}
    with launchable(setting):
        for name, backend in OPS["experts"].backends.items():
            if problem := backend.unsupported(setting):
                absent[name] = problem
            else:
                took[name] = seconds(name, leaves, choice, activation, arguments.repeats)
    # Forward: tokens and weights in, outputs out. Backward: those and the gradient in, gradients out.
    least = sum(tensor.nbytes for tensor in leaves) * 3 + 2 * leaves[0].nbytes
    print(f"{arguments.tokens} tokens, {activation}, {tuple(leaves[1].shape)} and {tuple(leaves[2].shape)}")
    for name, each in sorted(took.items(), key=lambda entry: entry[1]):
        print(
            f"{name:10} {1e3 * each:9.2f} ms  {took['grouped'] / each:6.2f} × grouped  {least / each / 1e9:8.1f} GB/s"
        )
    for name, problem in absent.items():
        print(f"{name:10} not here: {problem}")


if __name__ == "__main__":
    main()

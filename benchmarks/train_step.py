"""One training step of a preset on a GPU: tokens/s, MFU, peak memory, and the kernels that take the most time.

    python benchmarks/train_step.py [--preset h100-4b] [--tokens 8192,16384] [--precision bf16,fp8:current]
        [--recompute none,selective] [--compile] [--graphs] [--memory-fraction 0.553]
        [--out benchmarks/results/train_step.json]

Micro-batches of packed random documents and the optimizer step are timed separately; a full step consists of the
preset's number of micro-batches and one optimizer step. MFU relates the FLOPs of `trainer.arithmetic.flops` (without
recomputation) to the dense BF16 peak of the device, in every precision. Then each kind of layer is timed alone, forward
and backward, beside the shortest time that the GPU's peaks allow (trainer/arithmetic/roofline.py; of another GPU than
this one with `--gpu`), and their ratio. Kernels are those that `yaongi doctor` or a run has proven here.
`--memory-fraction 0.553` (78 of 141 GB) shows on an H200 what fits on an 80 GB GPU; a run that does not fit is recorded
too. Without a GPU it runs on the CPU, only to check that it works.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from manifests.spec import JobTrainSpec, load_job
from trainer import precision
from trainer.arithmetic.activations import activations
from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.gpus import by_device, by_option
from trainer.arithmetic.roofline import by_layers
from trainer.compiled import Batch
from trainer.distributed import pick_device
from trainer.files import atomic_write
from trainer.fp8.convert import convert
from trainer.fp8.table import conversion_table
from trainer.model.compiling import compile_layers
from trainer.model.graphs import LayerGraphs
from trainer.model.hybrid import HybridModel, Layer, build_model
from trainer.optim import build_optimizers
from trainer.parallel.layout import Layout
from trainer.parallel.mesh import keep_copies
from trainer.precision import Precision
from trainer.proof.start import remember
from trainer.recomputing import set_policy
from trainer.recording.recorder import peak_flops
from trainer.runtimespec import RuntimeSpec
from trainer.spec import PrecisionSpec
from trainer.specbase import parse

TOP_KERNELS = 15
OUTSIDE = "the rest"  # embedding, last norm, head and loss, multi-token prediction
MEAN_DOCUMENT = 512  # tokens


@dataclass
class Result:
    """The figures of one combination, in bytes and seconds; `problem` is set instead if it could not run."""

    tokens: int
    precision: str
    recompute: str
    compiled: bool
    graphs: bool = False
    micro_batch_seconds: float | None = None
    optimizer_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    activation_bytes_by_arithmetic: int | None = None
    backends: dict[str, str] = field(default_factory=dict)
    kernels: list[tuple[str, float, int]] = field(default_factory=list)  # name, share of the device's time, calls
    gpu: str | None = None  # whose peaks the bounds are of
    kinds: list[tuple[str, int, float | None, float]] = field(default_factory=list)  # layer, count, bound, measured
    problem: str | None = None


def packed_rows(vocab_size: int, rows: int, length: int, device: torch.device) -> Batch:
    """Token ids, document ids and labels of one micro-batch, and the number of documents."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocab_size, (rows, length), generator=generator)
    begins_BT = torch.rand(rows, length, generator=generator) < 1 / MEAN_DOCUMENT
    seq_idx_BT = begins_BT.int().cumsum(1, dtype=torch.int32)
    count = rows + int(begins_BT[:, 1:].sum())
    return ids_BT.to(device), seq_idx_BT.to(device), ids_BT.roll(-1, dims=1).to(device), count


def seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean seconds of a call, after one warm-up call."""
    run()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - started) / repeats


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def top_kernels(run: Callable[[], object], device: torch.device) -> list[tuple[str, float, int]]:
    """The kernels (on a CPU: operations) that take the most device time."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        run()
        synchronise(device)
    return largest(profiled.key_averages(), on_gpu=on_gpu)


def largest(events: Iterable[Any], *, on_gpu: bool) -> list[tuple[str, float, int]]:
    """Name, share of the time and number of calls of the most expensive of a profiler's averages.

    On a GPU only kernels count: torch adds their time also to the operations that launched them and to user ranges.
    """
    if on_gpu:
        events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    times = [(e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count) for e in events]
    whole = sum(spent for _name, spent, _count in times)
    times.sort(key=lambda entry: -entry[1])
    return [(name, spent / whole, count) for name, spent, count in times[:TOP_KERNELS]]


def by_kind(model: HybridModel, batch: Batch, chosen: Precision, repeats: int) -> dict[str, tuple[int, float]]:
    """For the layers with the same symbols: how many there are, and seconds of one of them, forward and backward.

    It is the one in the middle, as those at the ends are not in FP8.
    """
    ids_BT, device_type = batch[0], batch[0].device.type
    places: dict[str, list[int]] = {}
    for index, symbols in enumerate(model.spec.layers):
        places.setdefault(symbols, []).append(index)
    given: list[Any] = []  # to the first layer
    hook = model.layers[0].register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    with chosen.autocast(device_type), torch.no_grad():
        model(*batch)
    hook.remove()
    x_BTD, _, documents = given
    found = {}
    for symbols, indices in places.items():
        layer, x_BTD = model.layers[indices[len(indices) // 2]], x_BTD.detach().requires_grad_()

        def run(layer: Layer = layer, x_BTD: Tensor = x_BTD) -> None:
            with chosen.autocast(device_type):
                y_BTD, aux, _ = layer(x_BTD, ids_BT, documents)
            roots = [y_BTD, aux] if aux.requires_grad else [y_BTD]
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])

        found[symbols] = len(indices), seconds(run, repeats, ids_BT.device)
    return found


def set_beside(train: JobTrainSpec, result: Result, found: dict[str, tuple[int, float]], chosen: Precision) -> None:
    """Bounds and measured seconds of a micro-batch by kind of layer; the last row is what is outside of layers."""
    bounds: dict[str, float] = {}
    if (gpu := by_option(result.gpu) if result.gpu else None) and chosen.name in ("bf16", "fp8"):
        rows = conversion_table(train.model, chosen.fp8) if chosen.fp8 else []
        bounds = by_layers(
            train.model,
            gpu,
            seq_len=train.seq_len,
            tokens=result.tokens,
            precision=chosen.name,
            converted=[row.name for row in rows if row.converted],
        )
    rest = result.micro_batch_seconds - sum(count * each for count, each in found.values())
    for symbols, (count, each) in {**found, "": (1, rest)}.items():
        result.kinds.append((symbols or OUTSIDE, count, bounds.get(symbols), count * each))


def no_graphs(problem: str) -> None:
    raise ValueError(f"the layers cannot be recorded: {problem}")


def measure(train: JobTrainSpec, result: Result, device: torch.device, repeats: int) -> None:
    """Fill in the figures of one combination. Raises ValueError or torch.OutOfMemoryError if it cannot run."""
    name, _, recipe = result.precision.partition(":")
    fp8 = {"recipe": recipe, "implementation": "torch" if device.type == "cuda" else "emulated"} if recipe else {}
    chosen = precision.resolve(parse(PrecisionSpec, {"dtype": name, "fp8": fp8}), precision.device_capability(device))
    rows = max(1, result.tokens // train.seq_len)
    batch = packed_rows(train.model.vocab_size, rows, result.tokens // rows, device)
    model = build_model(
        train.model,
        train.backends,
        device=device,
        dtype=chosen.autocast_dtype,
        seed=0,
        token_classes=list(range(train.model.vocab_size)),
    )
    optimizers = build_optimizers(model, train.optimizer, train.model)
    state = convert(model, train.model, chosen.fp8, device) if chosen.fp8 else None
    keep_copies(model, Layout(), device, chosen.autocast_dtype)
    set_policy(model, parse(RuntimeSpec, {"activation_checkpointing": result.recompute}).activation_checkpointing)
    if result.compiled:
        compile_layers(model)
    if result.graphs:
        model.graphs = LayerGraphs(model, no_graphs)
    result.backends = {op: choice.label for op, choice in model.choices.items()}

    def micro_batch() -> None:
        with chosen.autocast(device.type):
            output = model(*batch)
        ((output.ce_sum + train.model.mtp_factor * output.mtp_ce_sum_K.sum()) / result.tokens).backward()

    def update() -> None:
        optimizers.step()
        if state is not None:
            state.finish_step()

    result.micro_batch_seconds = seconds(micro_batch, repeats, device)
    result.optimizer_seconds = seconds(update, 1, device)
    result.kernels = top_kernels(micro_batch, device)
    set_beside(train, result, by_kind(model, batch, chosen, repeats), chosen)
    per_step = train.batch.tokens_per_step
    step_seconds = per_step / result.tokens * result.micro_batch_seconds + result.optimizer_seconds
    result.tokens_per_second = per_step / step_seconds
    if (peak := peak_flops(device)) is not None:
        result.mfu = flops_per_token(train.model, train.seq_len) * result.tokens_per_second / peak
    by_token = activations(train.model, train.seq_len, result.recompute, chosen.name).peak
    result.activation_bytes_by_arithmetic = by_token * result.tokens
    if device.type == "cuda":
        result.peak_bytes = torch.cuda.max_memory_allocated(device)


def run(train: JobTrainSpec, result: Result, device: torch.device, repeats: int) -> None:
    """`measure`, but a failure becomes part of the result, and memory is freed for the next combination."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        measure(train, result, device, repeats)
    except (ValueError, torch.OutOfMemoryError) as error:
        result.problem = str(error).splitlines()[0]
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def show(result: Result) -> None:
    what = f"{result.tokens} tokens, {result.precision}, recompute {result.recompute}"
    print(f"{what}{', compiled' if result.compiled else ''}{', CUDA graphs' if result.graphs else ''}")
    if result.problem:
        print(f"  does not run: {result.problem}")
        return
    mfu = "no peak known" if result.mfu is None else f"MFU {result.mfu:.1%}"
    peak = "not measured" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.1f} GB"
    print(f"  {result.tokens_per_second:,.0f} tokens/s, {mfu}, peak memory {peak}")
    print(f"  {result.micro_batch_seconds:.3f} s a micro-batch, {result.optimizer_seconds:.3f} s an optimizer step")
    print(f"  {', '.join(f'{op}: {backend}' for op, backend in result.backends.items())}")
    for kind, count, bound, took in result.kinds:
        beside = "" if bound is None else f", {1e3 * bound:9.3f} at best on {result.gpu}: {took / bound:5.1f} times"
        print(f"  {count:3d} × {kind:10} {1e3 * took:10.3f} ms a micro-batch{beside}")
    for kernel, share, count in result.kernels:
        print(f"  {share:6.1%} {count:6d} × {kernel[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="h100-4b", help="a preset's name or a job file")
    parser.add_argument("--tokens", default="8192,16384", help="of a micro-batch")
    parser.add_argument("--precision", default="bf16", help="bf16, fp32, fp16, fp8:delayed, fp8:current, fp8:block128")
    parser.add_argument("--recompute", default="none,selective", help="none, selective, full")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="layers as CUDA graphs; a CPU has none")
    parser.add_argument("--gpu", type=lambda name: by_option(name).name, help="whose peaks are the bound (h100, …)")
    parser.add_argument("--repeats", type=int, default=5, help="micro-batches timed")
    parser.add_argument("--memory-fraction", type=float, help="of the GPU's memory that may be used")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    arguments = parser.parse_args()

    train, device = load_job(arguments.preset).train, pick_device("auto")
    remember(device)
    if arguments.memory_fraction and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(arguments.memory_fraction, device)
    here = by_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peaks = arguments.gpu or (here.name if here else None)
    graphs = arguments.graphs and device.type == "cuda"
    results = []
    lists = (arguments.tokens, arguments.precision, arguments.recompute)
    for tokens, wanted, policy in product(*(values.split(",") for values in lists)):
        result = Result(int(tokens), wanted, policy, arguments.compile, graphs, gpu=peaks)
        run(train, result, device, arguments.repeats)
        show(result)
        results.append(asdict(result))
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report = {
        "preset": arguments.preset,
        "device": device_name,
        "torch": torch.__version__,
        "memory_fraction": arguments.memory_fraction,
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(arguments.out, json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()

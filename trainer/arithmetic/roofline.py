"""The shortest time that a GPU's peaks allow for a training step, by kind of work: its roofline. Imports no torch.

For each kind: operations and bytes of a whole step, and as bound the longer of operations / peak and bytes / bandwidth.
Bytes are those of kernels that are fused as far as anyone has done it: each reads its inputs from memory once, writes
its results once, and finds the rest in caches (`Stage` of trainer/kinds/base.py). Weights are read as BF16 or FP8
copies, made once a step; their gradients are summed in FP32 by the products. Nothing is recomputed, ranks exchange
nothing, and elementwise operations cost nothing. A real step is slower; how much, `benchmarks/train_step.py` prints.

The operations of the model are those of trainer/arithmetic/flops.py; the optimizer's are not part of MFU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from trainer.arithmetic.activations import WIDTHS
from trainer.arithmetic.flops import TRAINING_PASSES, flops_per_token, matrix_flops_per_token
from trainer.arithmetic.gpus import Gpu
from trainer.errors import SpecError
from trainer.fp8.table import conversion_table
from trainer.kinds.base import FP32_BYTES, Kind, Parameter, Stage, Widths, product
from trainer.kinds.moe import MoeSpec
from trainer.modelspec import ModelSpec
from trainer.optim.rules import STATE_BYTES, Assignment, assign
from trainer.parameters import head, mixer_parameters, parameters
from trainer.spec import OptimizerSpec, TrainSpec

BF16_BYTES, FP8_BYTES = 2, 1
NORMS, ADAPTERS, HEAD = "norms and additions", "adapters", "head and loss"
MUON, ADAMW, NORM = "optimizer: Muon", "optimizer: AdamW", "optimizer: gradient norm"


@dataclass
class Work:
    """Of one kind in a step: operations, how many of them are in FP8, and bytes moved."""

    flops: float = 0.0
    fp8_flops: float = 0.0
    bytes: float = 0.0

    def add(self, flops: float = 0.0, fp8_flops: float = 0.0, moved: float = 0.0) -> None:
        self.flops += flops
        self.fp8_flops += fp8_flops
        self.bytes += moved

    def compute_seconds(self, gpu: Gpu) -> float:
        fp8 = self.fp8_flops / gpu.fp8_flops if gpu.fp8_flops else 0.0
        return (self.flops - self.fp8_flops) / gpu.flops + fp8

    def seconds(self, gpu: Gpu) -> float:
        """The bound."""
        return max(self.compute_seconds(gpu), self.bytes / gpu.bandwidth)

    def limit(self, gpu: Gpu) -> str:
        """What the bound comes from."""
        return "compute" if self.compute_seconds(gpu) > self.bytes / gpu.bandwidth else "memory"


@dataclass(frozen=True)
class Roofline:
    """A step of one GPU that holds the whole model.

    Attributes:
        rows: work by kind.
        tokens: of the step.
        model_flops: operations that MFU counts.
        notes: lines for below the table.
    """

    gpu: Gpu
    rows: dict[str, Work]
    tokens: int
    model_flops: float
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(work.seconds(self.gpu) for work in self.rows.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Of the dense BF16 peak, as everywhere in this project."""
        return self.model_flops / self.seconds / self.gpu.flops


def roofline(
    model: ModelSpec,
    gpu: Gpu,
    *,
    seq_len: int,
    micro_batch_tokens: int,
    micro_batches: int,
    precision: str = "bf16",
    converted: Iterable[str] = (),
    optimizer: OptimizerSpec | None = None,
) -> Roofline:
    """The roofline of a step of `micro_batches` · `micro_batch_tokens` tokens in rows of `seq_len`.

    Args:
        precision: bf16, fp16 or fp8.
        converted: names of the weights that multiply in FP8 (trainer/fp8/table.py).

    Raises:
        SpecError: the precision is another one, or the GPU has no FP8.
    """
    _check(gpu, precision)
    step = _Step(model, seq_len, micro_batch_tokens, micro_batches, WIDTHS[precision], frozenset(converted))
    step.add_model()
    step.add_optimizer(optimizer or OptimizerSpec())
    tokens = micro_batch_tokens * micro_batches
    notes = tuple(_note(moe, model, micro_batch_tokens, step.widths) for moe in model.sections(MoeSpec))
    return Roofline(gpu, dict(step.rows), tokens, flops_per_token(model, seq_len) * tokens, notes)


def by_layers(
    model: ModelSpec, gpu: Gpu, *, seq_len: int, tokens: int, precision: str = "bf16", converted: Iterable[str] = ()
) -> dict[str, float]:
    """The bound of a micro-batch, forward and backward, in seconds: of all layers with the same symbols together, and
    under "" of what is outside of layers. Their sum is that of the roofline, without the optimizer. Arguments and
    errors as for `roofline`.
    """
    _check(gpu, precision)

    def step() -> _Step:
        return _Step(model, seq_len, tokens, 1, WIDTHS[precision], frozenset(converted))

    found: dict[str, float] = defaultdict(float)
    whole = step()
    whole.add_model()
    for place, section in model.trunk():
        sublayer = step()
        sublayer._add_sublayer(section, f"layers.{place}.")
        found[model.layers[int(place.partition(".")[0])]] += sublayer.seconds(gpu)
    return {**found, "": whole.seconds(gpu) - sum(found.values())}


def _check(gpu: Gpu, precision: str) -> None:
    if precision == "fp32":
        raise SpecError("--gpu: peaks are of BF16 and FP8, train.precision.dtype is fp32; write bf16, fp8 or auto")
    if precision == "fp8" and gpu.fp8_flops is None:
        raise SpecError(f"--gpu {gpu.name}: it has no FP8 products; write train.precision.dtype bf16, or name another")


def of_training(spec: TrainSpec, gpu: Gpu, world_size: int = 1) -> tuple[Roofline, str]:
    """The roofline of a run's steps on each of its ranks, and the sizes in words. `precision.dtype` auto counts as
    BF16; ranks that share one model are thought to do their part of the tokens with all of it.

    Raises:
        SpecError: see `roofline`.
    """
    precision = "bf16" if spec.precision.dtype == "auto" else spec.precision.dtype
    rows = conversion_table(spec.model, spec.precision.fp8) if precision == "fp8" else []
    found = roofline(
        spec.model,
        gpu,
        seq_len=spec.tokens.seq_len,
        micro_batch_tokens=spec.batch.rows * spec.tokens.seq_len,
        micro_batches=spec.micro_batches(world_size),
        precision=precision,
        converted=[row.name for row in rows if row.converted],
        optimizer=spec.optimizer,
    )
    size = f"{spec.micro_batches(world_size)} micro-batches of {spec.batch.rows} × {spec.tokens.seq_len}"
    return found, f"a step of {size} tokens, {precision}"


def _note(moe: MoeSpec, model: ModelSpec, tokens: int, widths: Widths) -> str:
    """The traffic of experts as it is counted, and without fused kernels."""
    stage = next(stage for stage in moe.stages(model, 0) if stage.name == "experts")
    moved, copied = stage.operands + stage.moved, moe.copied(model.hidden)
    fused, apart = (numbers * tokens * widths.product / 1e9 for numbers in (moved, copied))
    return (
        f"Activations of the experts in a layer and micro-batch: {fused:.1f} GB as counted here, {apart:.1f} GB where "
        "tokens are copied, activated and summed by kernels of their own"
    )


class _Step:
    """Adds up the work of a step."""

    def __init__(
        self, model: ModelSpec, seq_len: int, micro_tokens: int, count: int, widths: Widths, converted: frozenset[str]
    ) -> None:
        self.model, self.seq_len, self.widths, self.converted = model, seq_len, widths, converted
        self.tokens, self.count = micro_tokens * count, count
        self.rows: dict[str, Work] = defaultdict(Work)

    def seconds(self, gpu: Gpu) -> float:
        return sum(work.seconds(gpu) for work in self.rows.values())

    def add_model(self) -> None:
        model, hidden = self.model, self.model.hidden
        # A row of the table is read, what was found written; backward reads its gradient and adds it to the row's.
        self._add_stage(Stage("embedding", moved=2 * hidden, wide=3 * hidden), {})
        for place, section in model.trunk():
            self._add_sublayer(section, f"layers.{place}.")
        self._add_norm()
        self._add_head()
        for number in range(model.mtp.depth if model.mtp else 0):
            at = f"mtp.{number}."
            proj = {f"{at}proj.weight": p for p in parameters(model) if p.name == f"{at}proj.weight"}
            self._add_stage(product("multi-token projection", tuple(proj), 2 * hidden, hidden), proj)
            for index, symbol in enumerate(model.mtp.layer if model.mtp else ""):
                self._add_sublayer(model.section(symbol), f"{at}layer.{index}.")
            for _norm in range(3):
                self._add_norm()
            self._add_head()

    def _add_sublayer(self, section: Kind, prefix: str) -> None:
        found = {p.name: p for p in mixer_parameters(self.model, section)}
        for stage in section.stages(self.model, self.seq_len):
            self._add_stage(stage, {name: found.pop(name) for name in stage.weights}, f"{prefix}mixer.")
        for name, p in found.items():
            if p.multiplies:  # LoRA's
                rows, columns = p.shape[-2:]
                copies = p.active // (rows * columns)
                stage = product(ADAPTERS, (name,), copies * columns, copies * rows)
                self._add_stage(stage, {name: p}, f"{prefix}mixer.")
        self._add_norm(only_sum=not section.pre_norm)

    def _add_norm(self, only_sum: bool = False) -> None:
        """Sum and norm in one kernel: forward reads what is added and the stream, and writes the stream and the norm's
        result; backward reads its gradient, the stream and the stream's gradient, and writes this."""
        narrow, wide = (1, 2) if only_sum else (3, 5)
        width = narrow * self.widths.product + wide * self.widths.stream
        self.rows[NORMS].add(moved=width * self.model.hidden * self.tokens)

    def _add_head(self) -> None:
        """The logits never leave the chip: h is read, its gradient written."""
        weight = head(self.model)
        self._add_stage(Stage(HEAD, (weight.name,), self.model.hidden, self.model.hidden), {weight.name: weight})

    def _add_stage(self, stage: Stage, weights: dict[str, Parameter], prefix: str = "") -> None:
        flops = {name: float(matrix_flops_per_token([p])) for name, p in weights.items()}
        in_fp8 = {name for name in weights if prefix + name in self.converted}
        fp8 = sum(flops[name] for name in in_fp8)
        share = fp8 / sum(flops.values()) if fp8 else 0.0
        operand = (1 - share) * self.widths.product + share * FP8_BYTES
        moved = stage.operands * operand + stage.moved * self.widths.product + stage.wide * FP32_BYTES
        total = sum(flops.values()) + TRAINING_PASSES * stage.flops
        self.rows[stage.name].add(total * self.tokens, fp8 * self.tokens, moved * self.tokens)
        self.rows[stage.name].add(moved=sum(self._weight_bytes(p, name in in_fp8) for name, p in weights.items()))

    def _weight_bytes(self, p: Parameter, in_fp8: bool) -> float:
        """Two products of each micro-batch read it; a third one adds to its gradient, which the first only writes."""
        width = FP8_BYTES if in_fp8 else FP32_BYTES if p.whole else self.widths.product
        gradient = 0 if p.frozen else FP32_BYTES * (2 * self.count - 1)
        return p.count * (2 * width * self.count + gradient)

    def add_optimizer(self, spec: OptimizerSpec) -> None:
        """Each rank is thought to do all of it."""
        trained = {p.name: p for p in parameters(self.model) if not p.frozen}
        state = STATE_BYTES[spec.state_dtype]
        for each in assign([(p.name, p.shape) for p in trained.values()], spec, self.model):
            p = trained[each.name]
            copy = FP8_BYTES if each.name in self.converted else BF16_BYTES if p.multiplies and not p.whole else 0
            # Gradient read, weight and moments read and written, the narrow copy written.
            moved = p.count * (FP32_BYTES + 2 * FP32_BYTES + 2 * state * each.moments + copy)
            if each.optimizer == "muon":
                self.rows[MUON].add(moved=moved)
                for flops, bytes_ in _orthogonalised(each, spec.muon.steps):
                    self.rows[MUON].add(flops, moved=bytes_)
            else:
                self.rows[ADAMW].add(moved=moved)
        self.rows[NORM].add(moved=FP32_BYTES * sum(p.count for p in trained.values()))


def _orthogonalised(each: Assignment, steps: int) -> Iterator[tuple[float, float]]:
    """Operations and bytes for each block of a parameter, in BF16 by trainer/ops/orthogonalise.py.

    A step of an m × n matrix X computes G = XXᵀ, P = bG + cG² and (aI + P)X, so it reads X twice and writes it once,
    and reads or writes m × m numbers four times.
    """
    count, stacked = math.prod(each.shape[:-2]), len(each.stack)
    for rows in each.block_rows or each.shape[-2:-1]:
        m, n = sorted((rows, each.shape[-1] * stacked))  # side by side with the other layers' of the stack
        flops = steps * 2 * (2 * m * m * n + m * m * m)
        moved = BF16_BYTES * (steps * (3 * m * n + 4 * m * m) + 2 * m * n)
        yield count * flops / stacked, count * moved / stacked


def render(found: Roofline, title: str, console: Console) -> None:
    """Print the table, and the bounds of the whole step below it."""
    gpu, total = found.gpu, found.seconds
    table = Table(title=f"Roofline on {gpu.name}: {title}")
    table.add_column("kind", no_wrap=True)
    for column in ("TFLOP", "GB", "ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    for kind, work in found.rows.items():
        seconds = work.seconds(gpu)
        figures = _short(work.flops / 1e12), _short(work.bytes / 1e9), _short(seconds * 1e3)
        table.add_row(kind, *figures, f"{seconds / total:.1%}", work.limit(gpu))
    flops, moved = (sum(values) for values in zip(*((w.flops, w.bytes) for w in found.rows.values()), strict=True))
    table.add_section()
    table.add_row("a step", _short(flops / 1e12), _short(moved / 1e9), _short(total * 1e3), "100.0%", "")
    console.print(table)
    fp8 = f", {gpu.fp8_flops / 1e12:,.0f} in FP8" if gpu.fp8_flops else ""
    console.print(
        f"At most {found.tokens_per_second:,.0f} tokens/s on each GPU, MFU {found.mfu:.0%}, by peaks of "
        f"{gpu.flops / 1e12:,.0f} TFLOP/s in BF16{fp8} and {gpu.bandwidth / 1e12:.2f} TB/s."
    )
    for note in found.notes:
        console.print(f"{note}.")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

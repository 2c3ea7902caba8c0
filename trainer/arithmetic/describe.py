"""Describe a ModelSpec layer by layer: shapes, parameters, operations, memory. Arithmetic; imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby
from typing import get_args

from rich.console import Console
from rich.table import Table

from trainer import parity
from trainer.arithmetic.activations import activations
from trainer.arithmetic.flops import (
    core_flops_per_token,
    flops_per_token,
    matrix_flops_per_token,
    mtp_core_flops_per_token,
)
from trainer.arithmetic.memory import Memory, step_memory, training_memory
from trainer.arithmetic.states import cache_bytes
from trainer.kinds.base import Parameter
from trainer.modelspec import ModelSpec
from trainer.parallel.layout import Layout
from trainer.parameters import head, mtp_parameters, parameters, sublayer_parameters
from trainer.runtimespec import OF_ALL_LAYERS, Recomputing
from trainer.spec import BackendsSpec, OptimizerSpec, TrainSpec


@dataclass(frozen=True)
class Row:
    """One sublayer, or embedding, final norm or head.

    Attributes:
        shapes: of its weights, by name.
        params: all trainable elements; active: the active ones by A1.
        flops_per_token: training operations at the given length.
    """

    layer: int | None
    kind: str
    widths: str
    shapes: str
    params: int
    active: int
    flops_per_token: int


@dataclass(frozen=True)
class Description:
    """All figures of a model; counts in elements, sizes in bytes. `trained` is the part of `total` that is not frozen;
    `memory` is for a rank that holds the whole model."""

    rows: list[Row]
    seq_len: int
    total: int
    trained: int
    active_a1: int
    active_a2: int
    active_a3: int
    flops_per_token: int
    memory: Memory
    checkpoint_bytes: int
    text_bytes: int  # in generation, of a text without its tokens; activations in BF16
    token_bytes: int  # and of each token


BF16_BYTES = 2


def describe(spec: ModelSpec, seq_len: int, optimizer: OptimizerSpec | None = None) -> Description:
    """Figures of the model trained on rows of `seq_len` tokens by `optimizer` (None: the default one)."""
    optimizer = optimizer or OptimizerSpec()
    everything = parameters(spec)
    total = sum(parameter.count for parameter in everything)
    active = sum(parameter.active for parameter in everything)
    vocabulary = spec.vocab_size * spec.hidden
    memory = training_memory(spec, optimizer)
    return Description(
        rows=_rows(spec, seq_len, everything),
        seq_len=seq_len,
        total=total,
        trained=sum(parameter.count for parameter in everything if not parameter.frozen),
        active_a1=active,
        active_a2=active if spec.tied_embedding else active + vocabulary,
        active_a3=active - vocabulary,
        flops_per_token=flops_per_token(spec, seq_len),
        memory=memory,
        checkpoint_bytes=memory.weights + memory.optimizer,
        text_bytes=cache_bytes(spec, 0, BF16_BYTES),
        token_bytes=cache_bytes(spec, 1, BF16_BYTES) - cache_bytes(spec, 0, BF16_BYTES),
    )


def _rows(spec: ModelSpec, seq_len: int, everything: list[Parameter]) -> list[Row]:
    def row(layer: int | None, kind: str, widths: str, found: list[Parameter], core: int = 0) -> Row:
        count, active = sum(p.count for p in found), sum(p.active for p in found)
        return Row(layer, kind, widths, _shapes(found), count, active, matrix_flops_per_token(found) + core)

    by_name = {parameter.name: parameter for parameter in everything}
    embedding, final_norm = by_name["embedding.weight"], by_name["final_norm.weight"]
    rows = [row(None, "embedding", f"{spec.vocab_size} × {spec.hidden}", [embedding])]
    if spec.tied_embedding:  # looked up here, multiplied as the head
        rows = [replace(rows[0], active=0, flops_per_token=0)]
    for index, layer in enumerate(spec.layers):
        for place, symbol in enumerate(layer):
            section = spec.section(symbol, index)
            found = list(sublayer_parameters(spec, section, f"layers.{index}.{place}."))
            core = core_flops_per_token(spec, symbol, seq_len, index)
            rows.append(row(index, section.label, section.widths(), found, core))
    rows.append(row(None, "final norm", str(spec.hidden), [final_norm]))
    rows.append(row(None, "LM head", f"{spec.hidden} × {spec.vocab_size}", [head(spec)]))
    if spec.tied_embedding:
        rows[-1] = replace(rows[-1], params=0, shapes="the embedding's")
    for number, layer in enumerate([spec.mtp.layer] * spec.mtp.depth if spec.mtp else []):
        core = mtp_core_flops_per_token(spec, seq_len)
        kind = f"MTP {number + 1} ({layer})"
        rows.append(row(None, kind, "projection, layer, the head again", list(mtp_parameters(spec, number)), core))
    return rows


def render(description: Description, console: Console) -> None:
    """Print tables of the layers, their weights, the totals and the implementations.

    No figure is cut on a terminal of 80 columns; equal layers are printed once.
    """
    layers = Table(title=f"Layers (training operations at {description.seq_len} tokens)")
    layers.add_column("layer")
    layers.add_column("kind")
    for title in ("parameters", "active (A1)", "MFLOP/token"):
        layers.add_column(title, justify="right", no_wrap=True)
    alike: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for row in description.rows:
        place = "" if row.layer is None else str(row.layer)
        layers.add_row(place, row.kind, f"{row.params:,}", f"{row.active:,}", f"{row.flops_per_token / 1e6:,.2f}")
        alike[row.kind, row.widths, row.shapes] += [] if row.layer is None else [row.layer]
    weights = Table("kind", title="Weights by shape", show_lines=True)
    weights.add_column("in layers", max_width=16)
    weights.add_column("widths and weights")
    for (kind, widths, shapes), numbers in alike.items():
        weights.add_row(kind, _ranges(numbers), f"{widths}\n{shapes}")
    totals = Table(title="Totals")
    totals.add_column("what")
    totals.add_column("value", justify="right")
    frozen = description.trained < description.total
    for what, value in (
        ("parameters", f"{description.total:,}"),
        *([("trained (only adapters)", f"{description.trained:,}")] if frozen else []),
        ("active, all that multiplies a token (A1)", f"{description.active_a1:,}"),
        ("active with input embedding (A2)", f"{description.active_a2:,}"),
        ("active without LM head (A3)", f"{description.active_a3:,}"),
        ("training operations for each token", f"{description.flops_per_token / 1e9:,.3f} GFLOP"),
        ("checkpoint: weights and optimizer state", _gib(description.checkpoint_bytes)),
        ("generation, state of a text (BF16)", f"{description.text_bytes / 2**20:,.2f} MiB"),
        ("generation, for each token of it", f"{description.token_bytes / 2**10:,.2f} KiB"),
    ):
        totals.add_row(what, value)
    console.print(layers)
    console.print(weights)
    console.print(totals)
    console.print(_backends())


def render_memory(
    spec: TrainSpec, layout: object, console: Console, memory_of: Callable[[TrainSpec], Memory] | None = None
) -> None:
    """Print a rank's memory for a step under each policy of activation checkpointing, and what each recomputes.

    Args:
        layout: the mesh of the ranks.
        memory_of: the memory under another engine than our own, whose mesh `layout` is.
    """
    chosen = spec.runtime.activation_checkpointing
    policies: list[Recomputing] = ["none", "selective", "full", *([] if chosen in OF_ALL_LAYERS else [chosen])]
    if memory_of is None:
        assert isinstance(layout, Layout), "the mesh of our own engine"
        memory_of = partial(step_memory, layout=layout)
    found = [memory_of(_recomputing(spec, policy)) for policy in policies]
    size = f"{layout}; micro-batch {spec.batch.rows} × {spec.tokens.seq_len} tokens"
    table = Table("GiB", title=f"Memory of each rank on a GPU: {size}; activation checkpointing …")
    for policy in policies:
        table.add_column(f"{policy} (chosen)" if policy == chosen else str(policy), justify="right")
    names = {field.name: field.name for field in fields(Memory)} | {
        "gathered": "layers that fsdp gathers",
        "copies": "copies of weights for products",
        "optimizer": f"optimizer state ({spec.optimizer.state_dtype})",
        "reserved": "reserved for libraries and temporaries",
    }
    for name, title in [*names.items(), ("total", "total")]:
        table.add_row(title, *(f"{getattr(memory, name) / 2**30:,.2f}" for memory in found))
    console.print(table)
    if spec.engine == "megatron":  # what is recomputed is said of our own layers
        return
    tokens = spec.batch.rows * spec.tokens.seq_len
    for policy, memory in zip(policies[1:], found[1:], strict=True):
        saved = found[0].activations - memory.activations
        again = activations(spec.model, spec.tokens.seq_len, policy).recomputed
        console.print(f"{policy} saves {_gib(saved)} ({saved / tokens / 1e6:.2f} MB for each token), recomputing:")
        for line in again:
            console.print(f"  {line}")


def _recomputing(spec: TrainSpec, policy: Recomputing) -> TrainSpec:
    return spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"activation_checkpointing": policy})})


def _ranges(numbers: list[int]) -> str:
    """Rising numbers with consecutive ones as first–last."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _shapes(found: list[Parameter]) -> str:
    """The weights of a sublayer as name(shape), no blank in between where a line could break; the last two parts of a
    name tell them apart."""
    texts = []
    for parameter in found:
        name = parameter.name.removesuffix(".weight").rpartition("mixer.")[2].split(".")
        texts.append(f"{'.'.join(name[-2:]) if 'mixer.' in parameter.name else name[-1]}({_shape(parameter.shape)})")
    return ", ".join(texts)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _backends() -> Table:
    """The implementations that `auto` may choose; a run's log has its choice and the reason."""
    table = Table(title="Implementations (backends), and where parity records prove them")
    for title in ("operation", "backend", "proven in"):
        table.add_column(title)
    for op, field in BackendsSpec.model_fields.items():
        for backend in get_args(field.annotation):
            if backend not in ("auto", "reference"):
                table.add_row(op, backend, ", ".join(parity.device_classes(op, backend)) or "nowhere yet: unproven")
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"

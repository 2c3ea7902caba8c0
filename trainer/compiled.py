"""Compare compiled layers with the same eager layers before a run that compiles.

A compiler may lose a gradient silently while the loss looks right. So each kind of layer of the run is built alone, as
a small model with the run's widths, backends, precision, expert sharding and micro-batch shapes, and one micro-batch
goes through it twice. It is removed before the run's own model is built and has no side effects: no random number is
drawn, and the compiler's in-memory state is reset (its code on disk is reused).
"""

from __future__ import annotations

import gc
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer import agreement
from trainer.arithmetic.activations import regions
from trainer.distributed import World
from trainer.errors import SpecError, first_line
from trainer.fp8 import te
from trainer.fp8.convert import put, why_not_experts
from trainer.fp8.table import conversion_table
from trainer.kinds.base import PlacedKind
from trainer.model.compiling import compile_layers
from trainer.model.hybrid import HybridModel, build_model
from trainer.model.rows import own_rows
from trainer.modelspec import ModelSpec
from trainer.ops import Choice
from trainer.parallel.layout import Layout
from trainer.parallel.mesh import Mesh, keep_copies
from trainer.parameters import parameters
from trainer.precision import Precision
from trainer.recomputing import set_policy
from trainer.runtimespec import OF_ALL_LAYERS, Recomputing
from trainer.spec import BatchSpec, TokensSpec, TrainSpec

log = logging.getLogger(__name__)

# Limits of |compiled - eager| / |eager| of each gradient. Under reduced precision compiled code rounds less often, so
# some tokens go to other experts: 0.28 was seen; a lost gradient gives 1.
TOLERANCE = {"fp32": 1e-2, "fp16": 0.5, "bf16": 0.5, "fp8": 0.5}
NEGLIGIBLE = 1e-3  # of the largest gradient's norm: a smaller gradient may be only rounding
VOCABULARY, TABLE_ROWS = 512, 1024  # at most: the lookup code does not depend on the number of rows
DOCUMENT_TOKENS = 100  # on average

Batch = tuple[Tensor, Tensor, Tensor, int]  # what a model is called with


@dataclass(frozen=True)
class Kind:
    """Layers that compile to the same code.

    Attributes:
        placed: stand-ins for per-layer sections.
        converted: whether its matrix products are FP8.
        recomputed: where the policy is to recompute some layers whole, whether it is one of them.
    """

    symbols: str
    placed: tuple[PlacedKind, ...] = ()
    converted: bool = False
    recomputed: bool = False

    def __str__(self) -> str:
        marks = ["FP8"] * self.converted + ["recomputed"] * self.recomputed
        return f"{self.symbols} ({', '.join(marks)})" if marks else self.symbols

    def alone(self, spec: ModelSpec) -> ModelSpec:
        """A model with one layer of this kind."""
        changes: dict[str, Any] = {"layers": [self.symbols], "mtp": None}
        changes["vocab_size"] = min(spec.vocab_size, VOCABULARY)
        names = spec.section_names
        changes |= {names[symbol]: [] for symbol, kind in spec.kinds.items() if issubclass(kind, PlacedKind)}
        changes |= {names[section.symbol]: [section.model_dump(mode="json")] for section in self.placed}
        alone = spec.updated(changes)
        # A layer without adapters in a model with adapters would have nothing to train.
        return alone if any(not p.frozen for p in parameters(alone)) else alone.updated({"lora": None})


def agreed(spec: TrainSpec, world: World, mesh: Mesh, chosen: Precision, choices: dict[str, Choice]) -> bool:
    """Whether to compile layers; all ranks call this and get the same answer.

    Raises:
        SpecError: the spec demands it, but on some rank the compiler fails or its code gives other results.
    """
    wanted = spec.runtime.compile
    if wanted is False:
        return False
    found = agreement.problem(world, te.compile_problem(chosen.fp8) if chosen.fp8 else None)
    if found is None and mesh.layout.expert > 1:
        # Ranks that share experts run a layer together: if the compiler failed on one, the others would wait.
        found = agreement.problem(world, compiler_problem(world.device))
    compared = kinds(spec.model, chosen, spec.runtime.activation_checkpointing)
    for kind in compared:
        if found is None:
            found = agreement.problem(world, problem(kind, spec, world.device, mesh, chosen, choices))
    if found is None:
        log.info("layers are compiled; %s computed as without the compiler", ", ".join(map(str, compared)))
        return True
    if wanted is True:
        raise SpecError(f"train.runtime.compile: {found}; write false, or auto to compile only where that is right")
    log.warning("layers are not compiled: %s", found)
    return False


def kinds(spec: ModelSpec, chosen: Precision, policy: Recomputing = "none") -> list[Kind]:
    """The different kinds of layers in a model, including those of multi-token prediction."""
    return list(counted(spec, chosen, policy))


def counted(spec: ModelSpec, chosen: Precision, policy: Recomputing = "none") -> Counter[Kind]:
    """How many layers of each kind a model has."""
    whole = [] if policy in OF_ALL_LAYERS else regions(spec, policy)
    again = {layer for first, last in whole for layer in range(first, last)}
    ends = chosen.fp8.bf16_end_layers if chosen.fp8 else len(spec.layers)
    found = []
    for index, symbols in enumerate(spec.layers):
        sections = (spec.section(symbol, index) for symbol in symbols)
        placed = tuple(section.stand_in(TABLE_ROWS) for section in sections if isinstance(section, PlacedKind))
        found.append(Kind(symbols, placed, ends <= index < len(spec.layers) - ends, index in again))
    if spec.mtp:
        deepest = len(spec.layers) + spec.mtp.depth
        found += [Kind(spec.mtp.layer, recomputed=layer in again) for layer in range(len(spec.layers), deepest)]
    return Counter(found)


def shapes(tokens: TokensSpec, batch: BatchSpec) -> list[tuple[int, int]]:
    """(rows, row length) of the run's micro-batches, in order."""
    return [(batch.rows * tokens.seq_len // length, length) for length in tokens.seq_lens]


def problem(
    kind: Kind, spec: TrainSpec, device: torch.device, mesh: Mesh, chosen: Precision, choices: dict[str, Choice]
) -> str | None:
    """The problem of the compiled code of a kind of layer, else None. Ranks that share experts call it together."""
    # Imported only when the compiler is used.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    with leaving_nothing(device):
        model = build(kind, spec, device, mesh, chosen, choices)
        compile_layers(model)
        for rows, length in shapes(spec.tokens, spec.batch):
            batch = micro_batch(model.spec.vocab_size, rows, length, device)
            with torch.compiler.set_stance("force_eager"):
                expected = gradients(model, batch, chosen)
            try:
                found = gradients(model, batch, chosen)
            except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
                return f"the compiler fails on layer {kind} ({first_line(getattr(error, 'inner_exception', error))})"
            name, difference = furthest(found, expected)
            if not difference <= TOLERANCE[chosen.name]:
                return (
                    f"compiled layer {kind} computes something else than the layer itself: {name} is off by "
                    f"{difference:.1%}, rounding explains less than {TOLERANCE[chosen.name]:.0%}"
                )
    return None


def compiler_problem(device: torch.device, backend: str | Callable[..., object] = "inductor") -> str | None:
    """Why this rank's compiler does not work at all, for example without a C++ compiler; None if it works."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    def program(x: Tensor) -> Tensor:
        return x.sin().square().sum()

    with leaving_nothing(device):
        try:
            torch.compile(program, backend=backend)(torch.ones(64, device=device, requires_grad=True)).backward()
        except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
            return f"the compiler fails ({first_line(getattr(error, 'inner_exception', error))})"
    return None


@contextmanager
def leaving_nothing(device: torch.device) -> Iterator[None]:
    """Restore random state, memory and the compiler's knowledge of shapes after the block."""
    on_gpu = device.type == "cuda"
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def build(
    kind: Kind, spec: TrainSpec, device: torch.device, mesh: Mesh, chosen: Precision, choices: dict[str, Choice]
) -> HybridModel:
    """A layer of this kind as the run will call it, between embedding and head."""
    return _build(kind, kind.alone(spec.model), spec, device, mesh.layout, chosen, choices, share=mesh.share_experts)


def build_own_share(
    kind: Kind, spec: TrainSpec, device: torch.device, layout: Layout, chosen: Precision, choices: dict[str, Choice]
) -> HybridModel:
    """As `build`, but with as many experts as this rank has of its own, so that it waits for no other rank."""
    alone = kind.alone(spec.model)
    if alone.moe and layout.expert > 1:
        own = alone.moe.num_experts // layout.expert
        alone = alone.updated({"moe": {"num_experts": own, "top_k": min(alone.moe.top_k, own)}})
    return _build(kind, alone, spec, device, layout, chosen, choices)


def _build(
    kind: Kind,
    alone: ModelSpec,
    spec: TrainSpec,
    device: torch.device,
    layout: Layout,
    chosen: Precision,
    choices: dict[str, Choice],
    share: Callable[[HybridModel], None] | None = None,
) -> HybridModel:
    dtype = chosen.autocast_dtype
    model = build_model(alone, device=device, dtype=dtype, seed=spec.seed, share=share, choices=choices)
    if kind.converted and chosen.fp8:
        fp8 = chosen.fp8.updated({"bf16_end_layers": 0})
        only_proven = spec.precision.fp8.implementation == "auto"
        table = conversion_table(alone, fp8, why_not_experts(model, fp8, device, only_proven=only_proven))
        if rows := [row for row in table if row.converted]:
            put(model, rows, fp8, device)
    if layout.data == "fsdp" and dtype is not None:
        for known in parameters(alone):
            parameter = model.get_parameter(known.name)
            in_layer = known.name.startswith("layers.")
            if in_layer and known.multiplies and not (known.whole or isinstance(parameter, DTensor)):
                parameter.data = parameter.data.to(dtype)  # as FSDP2 gathers it
    keep_copies(model, layout, device, dtype)
    policy = spec.runtime.activation_checkpointing
    set_policy(model, policy if policy in OF_ALL_LAYERS else "full" if kind.recomputed else "none")
    return model


def micro_batch(vocab_size: int, rows: int, length: int, device: torch.device, seed: int = 0) -> Batch:
    """Random tokens, split into random documents, their labels, and the number of documents."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, vocab_size, (rows, length), generator=generator)
    begins_BT = torch.rand(rows, length, generator=generator) < 1 / DOCUMENT_TOKENS
    ids_BT, seq_idx_BT, labels_BT = (
        tensor.to(device) for tensor in (ids_BT, begins_BT.int().cumsum(1, dtype=torch.int32), ids_BT.roll(-1, dims=1))
    )
    return ids_BT, seq_idx_BT, labels_BT, rows + int(begins_BT[:, 1:].sum())


def gradients(model: HybridModel, batch: Batch, chosen: Precision) -> dict[str, Tensor]:
    """Gradients by parameter name (of a sharded parameter, this rank's part), and the loss under its name."""
    with chosen.autocast(batch[0].device.type):
        output = model(*batch)
    loss = output.ce_sum + output.aux_sum
    loss.backward()
    found = {"the loss": loss.detach()}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[f"the gradient of {name.removeprefix('layers.0.')}"] = own_rows(gradient.detach())[0]
        parameter.grad = None
    return found


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor with the largest relative difference, and that difference; NaN counts as the largest."""
    norms = {name: torch.linalg.vector_norm(tensor.float()) for name, tensor in expected.items()}
    largest = max(norm.item() for name, norm in norms.items() if name != "the loss")
    worst = ("nothing", 0.0)
    for name, tensor in found.items():
        gap = torch.linalg.vector_norm(tensor.float() - expected[name].float()).item()
        part = gap / max(norms[name].item(), NEGLIGIBLE * largest, torch.finfo(torch.float32).tiny)
        if not part <= worst[1]:
            worst = (name, math.inf if math.isnan(part) else part)
    return worst

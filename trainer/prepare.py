"""Preparation of the first step from the spec: model, optimizers, newest checkpoint, data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from trainer import agreement, compiled, graphed, ops, rows
from trainer.begin import begin_with
from trainer.checkpoints.checkpoint import SKIPPED_IN_A_ROW, step_dir
from trainer.checkpoints.checkpointer import Checkpointer
from trainer.data.documents import shards_manifest
from trainer.data.loader import TokenLoader
from trainer.data.manifest import Manifest, read_manifest
from trainer.data.plan import Cursor
from trainer.data.tokenizer import Tokenizer
from trainer.distributed import World
from trainer.errors import SpecError
from trainer.exports import Exports, initial_source
from trainer.files import atomic_write
from trainer.fp8 import te
from trainer.fp8.convert import convert
from trainer.fp8.state import Fp8State
from trainer.fp8.te import TeState
from trainer.kinds.ngrams import token_classes
from trainer.model.compiling import compile_layers
from trainer.model.graphs import LayerGraphs
from trainer.model.hybrid import HybridModel, build_model
from trainer.optim import Optimizers, build_optimizers
from trainer.optim.rules import Assignment
from trainer.parallel.mesh import Mesh, keep_copies
from trainer.precision import Precision
from trainer.preflight import ranks as preflight
from trainer.proof import start as proof
from trainer.proof import told, trial
from trainer.proof.trial import Way
from trainer.recomputing import set_policy
from trainer.recording.recorder import Recorder
from trainer.spec import TrainSpec
from trainer.specbase import to_stored_yaml
from trainer.spikes import SpikeGuard
from trainer.validation import Validation

log = logging.getLogger(__name__)


@dataclass
class Run:
    """The state of the loop. `step_model` is the callable model: `model` itself or its DDP wrapper."""

    spec: TrainSpec
    world: World
    mesh: Mesh
    model: HybridModel
    step_model: nn.Module
    optimizers: Optimizers
    precision: Precision
    scaler: torch.amp.GradScaler | None
    fp8: Fp8State | TeState | None
    loader: TokenLoader
    checkpoints: Checkpointer
    recorder: Recorder
    exports: Exports
    validation: Validation | None
    first_step: int
    guard: SpikeGuard
    skipped_in_a_row: int


def prepare(spec: TrainSpec, world: World, started: float) -> Run:
    """Build everything, load the newest checkpoint, and log the choices with their reasons."""
    findings = preflight.of_ranks(spec.runtime.preflight, world)
    spec.check_shares(world.size)
    layout, by_whom = agreement.layout(spec, world)
    written, (spec, auto) = spec, rows.decide(spec, world, layout)
    recorder = Recorder(spec, world, started)
    recorder.preflight(findings)
    proofs = proof.at_start(spec, world)
    recorder.proof(proofs)
    chosen = agreement.rung(spec, world)
    if chosen.fp8:
        te.check_runtime(chosen.fp8, spec.runtime)
    choices = agreement.backends(spec, world, chosen.autocast_dtype)
    ops.say(choices)
    shards, digests, classes = read_data(spec, world)
    mesh = Mesh(layout, world.device)
    compiles = compiled.agreed(spec, world, mesh, chosen, choices)
    graphs = graphed.demanded(spec, world, mesh, chosen, choices, compiles=compiles)
    way, tried = trial.fastest(spec, world, layout, Way(chosen, choices, compiles, graphs))
    if tried:
        recorder.trial(tried)
        chosen, choices = way.precision, way.choices
        ops.say({change.what: choices[change.what] for change in tried.taken if change.what in choices})
        # What another backend compiles to has not been compared yet.
        compiles = way.compiles and (not tried.taken or compiled.agreed(spec, world, mesh, chosen, choices))
        graphs = way.graphs
    if world.is_main:
        told.keep(spec.run_dir, proofs, Way(chosen, choices, compiles, graphs), tried)
    model = build_model(
        spec.model,
        device=world.device,
        dtype=chosen.autocast_dtype,
        seed=spec.seed,
        token_classes=classes,
        share=partial(mesh.share, dtype=chosen.autocast_dtype),
        choices=choices,
    )
    optimizers = build_optimizers(
        model,
        spec.optimizer,
        spec.model,
        share_over=mesh.optimizer,
        orthogonalise=ops.functions(choices)["orthogonalise"],
        agree=world.broadcast,
    )
    proven = spec.precision.fp8.implementation == "auto"
    agree = partial(agreement.problem, world)
    fp8 = None
    if chosen.fp8:
        fp8 = convert(model, spec.model, chosen.fp8, world.device, only_proven=proven, agree=agree)
    backends = {name: choice.label for name, choice in choices.items()}
    log.info("mesh (copies x ranks of one copy): %s%s", layout, f" ({by_whom})" if by_whom else "")
    log.info("precision: %s (%s)", chosen.name, chosen.reason)
    for line in summary_lines(optimizers.table):
        log.info("%s", line)
    scaler = chosen.scaler(world.device.type)
    exports = Exports(spec)

    def published(step: int, seconds: float) -> None:
        recorder.checkpointed(step, seconds)
        exports.published(step_dir(spec.run_dir, step))

    checkpoints = Checkpointer(
        written,
        world,
        model,
        optimizers,
        digests,
        published,
        recorder.checkpoint_failed,
        fp8,
        former=[generation.digest for generation in shards.earlier],
        in_use=exports.in_use,
    )
    resumed = checkpoints.resume()
    if resumed:
        log.info("resuming from the checkpoint of step %d, saved by %d ranks", resumed.step, resumed.world_size)
        if scaler:
            scaler.load_state_dict({**scaler.state_dict(), **scaler_state(resumed.scalars)})
    elif spec.init_from:
        begin_with(spec, model, world)
    if not resumed and world.is_main and not (file := Path(spec.run_dir) / "train.yaml").exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, to_stored_yaml(written))
    recorder.begin(resumed, {"device": world.device.type, "precision": chosen.name, "mesh": str(layout), **backends})
    first_step = resumed.step if resumed else 0
    keep_copies(model, layout, world.device, chosen.autocast_dtype)
    set_policy(model, spec.runtime.activation_checkpointing)
    if compiles:
        compile_layers(model)
    if auto:
        spec = rows.try_out(spec, auto, world, layout, model, optimizers, chosen)
    micro_batches = spec.micro_batches(world.size)
    log.info("ranks: %d on %s, %d micro-batches each per step", world.size, world.device, micro_batches)
    loader = TokenLoader(
        spec.tokens,
        spec.batch,
        rank=world.rank,
        world_size=world.size,
        cursor=Cursor.from_dict(resumed.cursor) if resumed else None,
        steps=max(0, spec.steps - first_step),
        shards_digest=shards.digest,
    )
    if loader.left_out:
        log.warning(
            "%d documents were appended to the shards after this run had gone through those of before; it stays with "
            "what was there, as another order would repeat some",
            loader.left_out,
        )
    if graphs:
        model.graphs = LayerGraphs(model, partial(without_graphs, spec))
    validation = None
    if spec.evaluate.every_steps and first_step < spec.steps:
        validation = Validation(spec, world, layout, model, chosen, compiles=compiles)
    if spec.exporting.initial and not resumed:
        problem = checkpoints.save_weights(initial_source(spec.run_dir), 0, loader.cursor.to_dict())
        if problem and world.is_main:
            log.warning("the model before the first step is not exported: %s", problem)
    if world.is_main:
        exports.begin(first_step)
    guard = SpikeGuard(spec.optimizer.spike_guard)
    guard.load(resumed.scalars if resumed else {})
    return Run(
        spec=spec,
        world=world,
        mesh=mesh,
        model=model,
        step_model=mesh.wrap(model),
        optimizers=optimizers,
        precision=chosen,
        scaler=scaler,
        fp8=fp8,
        loader=loader,
        checkpoints=checkpoints,
        recorder=recorder,
        exports=exports,
        validation=validation,
        first_step=first_step,
        guard=guard,
        skipped_in_a_row=int(resumed.scalars.get(SKIPPED_IN_A_ROW, 0)) if resumed else 0,
    )


def without_graphs(spec: TrainSpec, problem: str) -> None:
    """Layers that could be recorded alone could not be together, for example for want of memory."""
    if spec.runtime.graphs is True:
        raise SpecError(f"train.runtime.graphs: the layers cannot be recorded ({problem}); write auto or false")
    log.warning("layers are launched kernel by kernel from here on, not as CUDA graphs: %s", problem)


def read_data(spec: TrainSpec, world: World) -> tuple[Manifest, dict[str, str], list[int] | None]:
    """The manifest of the shards that rank 0 sees, for text may be appended to them meanwhile; digests of shards and
    tokenizer; and the token classes that Engram's hashes need (None without Engram)."""
    shards = shards_manifest(spec.tokens)
    shards = shards_manifest(spec.tokens, world.broadcast(shards.digest))
    digests = {
        "shards": shards.digest,
        "tokenizer": read_manifest(spec.tokens.tokenizer, "tokenizer").digest,
    }
    size = Tokenizer.load(spec.tokens.tokenizer).vocab_size
    if size > spec.model.vocab_size:
        raise SpecError(
            f"train.model.vocab_size {spec.model.vocab_size} is below the tokenizer's {size} entries; raise it"
        )
    return shards, digests, token_classes(Path(spec.tokens.tokenizer) / "tokenizer.json") if spec.model.engram else None


def scaler_state(values: dict[str, float]) -> dict[str, float | int]:
    """The two changing values of a loss scaler, from its state or from a checkpoint's scalars."""
    plain = {name.removeprefix("scaler."): value for name, value in values.items()}
    return {"scale": plain["scale"], "_growth_tracker": int(plain["_growth_tracker"])} if "scale" in plain else {}


def summary_lines(table: list[Assignment]) -> list[str]:
    """One line for each optimizer: how many tensors and parameters it trains, how many without weight decay; then what
    is orthogonalised jointly."""
    lines = []
    for name in sorted({entry.optimizer for entry in table}):
        entries = [entry for entry in table if entry.optimizer == name]
        count = sum(torch.Size(entry.shape).numel() for entry in entries)
        undecayed = sum(not entry.decay for entry in entries)
        lines.append(f"optimizer {name}: {count:,} parameters in {len(entries)} tensors ({undecayed} without decay)")
    stacks = dict.fromkeys(entry.stack for entry in table if len(entry.stack) > 1)
    return [*lines, *(f"optimizer muon: {' + '.join(stack)} side by side (TEON)" for stack in stacks)]

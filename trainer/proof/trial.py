"""A short trial of the proven ways on the run's own shapes: which is the fastest for this model on this machine?

Each kind of layer is built alone (trainer/compiled.py), and one micro-batch of random tokens goes through it forward
and backward a few times. The times of the kinds, each as often as the model has it, are the time of a way. One thing is
changed at a time, from what would be taken without a trial: FP8, the backend of each operation, the compiler, CUDA
graphs; only the kinds that it concerns are timed again. A change that is faster is kept; FP8 stays only if it is shown
to be FP8_GAIN faster, as it costs accuracy. No rank waits for another within a trial, so what fails on one is only
passed over; the slowest rank's time counts.

Each change is written down before it is tried: one that ends the process, as a kernel may on large shapes, is passed
over by a later process. What has been measured by then is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from trainer import compiled, graphed, ops, precision
from trainer.compiled import Kind, leaving_nothing, micro_batch
from trainer.distributed import World
from trainer.errors import SpecError, first_line
from trainer.fields import stored
from trainer.fp8 import te
from trainer.model.hybrid import HybridModel
from trainer.ops import OPS, Choice, Setting
from trainer.parallel.layout import Layout
from trainer.precision import Precision
from trainer.proof import cache
from trainer.proof.child import unusable
from trainer.spec import Fp8Spec, TrainSpec

log = logging.getLogger(__name__)

FP8_GAIN = 0.05  # of the time without it
TRIES = 2  # of what has ended the process, which somebody else may have done
BASE, TAKEN = "as proven", "taken"
WARM_UPS, TIMED = 2, 5
ALL_SECONDS = 240.0


class Change(NamedTuple):
    """An operation and its backend; "compile", "no"; "graphs", "yes"; "fp8", its implementation; "fp8_experts", whether
    they are FP8, too; "precision", the rung below it."""

    what: str
    to: str

    def __str__(self) -> str:
        return f"{self.what}: {self.to}"


@dataclass(frozen=True)
class Way:
    """What a run chooses by itself."""

    precision: Precision
    choices: dict[str, Choice]
    compiles: bool
    graphs: bool = False

    @property
    def names(self) -> dict[str, str]:
        """Each choice by its name."""
        own = {"precision": self.precision.name}
        own |= {"compile": "yes" if self.compiles else "no", "graphs": "yes" if self.graphs else "no"}
        if self.precision.fp8:
            own["fp8"] = self.precision.fp8.implementation
            if self.precision.fp8.experts_from:
                own["fp8_experts"] = f"from {self.precision.fp8.experts_from} wide on"
        return own | {op: choice.name for op, choice in self.choices.items()}

    def changed(self, changes: Iterable[Change], spec: TrainSpec, device: torch.device) -> Way:
        way = self
        for what, to in changes:
            if what == "compile":
                way = replace(way, compiles=to == "yes")
            elif what == "graphs":
                way = replace(way, graphs=to == "yes")
            elif what == "precision":
                below = precision.resolve_for_evaluation(spec.precision, precision.device_capability(device))
                way = replace(way, precision=replace(below, reason=f"FP8 is not {FP8_GAIN:.0%} faster here"))
            elif what == "fp8":
                assert way.precision.fp8 is not None
                fp8 = way.precision.fp8.updated({"implementation": to})
                way = replace(way, precision=replace(way.precision, fp8=fp8, reason=f"FP8 by {to} is the fastest here"))
            elif what == "fp8_experts":
                assert way.precision.fp8 is not None and spec.model.moe is not None
                width = spec.model.moe.expert_width
                fp8 = way.precision.fp8.updated({"experts_from": width if to == "yes" else width + 1})
                way = replace(way, precision=replace(way.precision, fp8=fp8))
            else:
                reason = f"{OPS[what].backends[to].why}; the fastest in a trial"
                way = replace(way, choices=way.choices | {what: Choice(to, reason, proven=True)})
        return way


@dataclass(frozen=True)
class Row:
    """A change that was tried, the seconds of a micro-batch with it (None: there are none), and what became of it."""

    change: str
    seconds: float | None
    verdict: str


@dataclass(frozen=True)
class Trial:
    """The rows so far, the changes that were taken, the seconds spent, and how often each was begun."""

    rows: list[Row] = field(default_factory=list)
    taken: list[Change] = field(default_factory=list)
    seconds: float = 0.0
    begun: dict[str, int] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """The time of the way with the changes that were taken; None if it failed."""
        return next((row.seconds for row in reversed(self.rows) if row.change == BASE or row.verdict == TAKEN), None)

    @classmethod
    def of(cls, known: Any, common: list[Change]) -> Trial:
        """As `asdict` has written it for these changes; a new one if it is damaged."""
        try:
            trial = _TRIAL.validate_python(known)
        except ValueError:
            return cls()
        names = [BASE, *map(str, common)]
        fits = [row.change for row in trial.rows] == names[: len(trial.rows)] and set(trial.taken) <= set(common)
        return trial if fits and 0 <= trial.seconds < math.inf else cls()


_TRIAL = TypeAdapter(Trial)


def fastest(
    spec: TrainSpec, world: World, layout: Layout, way: Way, seconds: float = ALL_SECONDS
) -> tuple[Way, Trial | None]:
    """The fastest proven way, and the trial that shows it; a collective of all ranks.

    None where nothing is tried: on a CPU, where `runtime.prove` is off, and where the spec leaves nothing open.

    Args:
        way: what would be taken without a trial.
        seconds: what has not begun by then is not tried.
    """
    if not spec.runtime.prove or Setting(world.device).device_class == "cpu":  # the same on all ranks
        return way, None
    own = list(changes(spec, world.device, way))
    if spec.runtime.graphs == "auto" and _records(spec, world, replace(way.precision, fp8=None)) is None:
        own.append(Change("graphs", "yes"))  # of what has been taken by then
    # Ranks whose packages differ have different ones.
    told = [set(offered) for offered in world.gather(own)]
    common = [change for change in world.broadcast(own) if all(change in offered for offered in told)]
    if not common:
        return way, None
    key, places = digest(spec, layout, way, common), cache.files(world.device, spec.run_dir)
    seconds = min(seconds, spec.runtime.hang_timeout_seconds / 4)
    known = world.broadcast(cache.read(places, world.device).trials.get(key) if world.is_main else None)

    def keep(trial: Trial, places: list[Path] = places[:1]) -> None:
        # Half a trial is this run's own: for another that starts now, a change that was begun here ends no process.
        cache.write(places, cache.Known(trials={key: asdict(trial)}), world.device)

    before = Trial.of(known, common)
    trial = tried(spec, world, layout, way, common, seconds, before, keep if world.is_main else None)
    if world.local_rank == 0:
        keep(trial, places)
    return way.changed(trial.taken, spec, world.device), trial


def changes(spec: TrainSpec, device: torch.device, way: Way) -> Iterator[Change]:
    """Each thing that the spec leaves open and that could be otherwise here, what matters most first."""
    if way.precision.fp8:
        yield from _fp8_changes(spec, device, way.precision.fp8)
    setting = Setting(device, way.precision.autocast_dtype or torch.float32, spec.model)
    offered = [
        Change(op, name)
        for op, choice in way.choices.items()
        if getattr(spec.backends, op) == "auto"
        for name, verdict in ops.survey(op, setting).items()
        if name not in ("reference", choice.name) and verdict.problem is verdict.doubt is None
    ]
    portable = [change for change in offered if OPS[change.what].backends[change.to].portable]
    yield from (change for change in offered if change not in portable)
    if spec.runtime.compile == "auto" and way.compiles:
        yield Change("compile", "no")
    yield from portable


def _fp8_changes(spec: TrainSpec, device: torch.device, fp8: Fp8Spec) -> Iterator[Change]:
    """Its other implementations, then none at all."""
    capability = precision.device_capability(device)
    if fp8.implementation in precision.PACKAGES and spec.precision.fp8.implementation == "auto":
        for name, problem in precision.fp8_problems(spec.precision, capability).items():
            if problem is None and name != fp8.implementation:
                with suppress(SpecError):
                    te.check_runtime(fp8.updated({"implementation": name}), spec.runtime)
                    yield Change("fp8", name)
    if spec.precision.dtype == "auto":
        if spec.model.moe and fp8.experts_from:
            yield Change("fp8_experts", "no" if spec.model.moe.expert_width >= fp8.experts_from else "yes")
        yield Change("precision", precision.resolve_for_evaluation(spec.precision, capability).name)


def tried(
    spec: TrainSpec,
    world: World,
    layout: Layout,
    way: Way,
    common: list[Change],
    seconds: float,
    before: Trial = Trial(),
    keep: Callable[[Trial], None] | None = None,
) -> Trial:
    """Time the way and each change of it, and keep what is faster.

    Args:
        before: what an earlier process has done of it.
        keep: writes down how far it has come.
    """
    trial, began = before, time.monotonic() - before.seconds
    seen: dict[tuple[Kind, str], float] = {}
    for change in [None, *common][len(before.rows) :]:
        name = BASE if change is None else str(change)
        spent = world.broadcast(time.monotonic() - began)
        trial = replace(trial, seconds=spent, begun=trial.begun | {name: trial.begun.get(name, 0) + 1})
        took = None
        if change and spent > seconds:
            # FP8 has to show what it gains.
            taken = change.what == "precision"
            verdict = f"not tried: the trial took longer than {seconds:g} s" + taken * ", and so FP8 is not used"
        elif trial.begun[name] > TRIES:
            taken, verdict = False, "ends the process"
        else:
            if keep:
                keep(trial)
            changed = way.changed([*trial.taken, *([change] if change else [])], spec, world.device)
            took = measured(spec, world, layout, changed, seen)
            taken, verdict = _judged(change, took, trial.best)
        rows = [*trial.rows, Row(name, took, verdict)]
        trial = replace(trial, rows=rows, taken=[*trial.taken, change] if change and taken else trial.taken)
    return trial if trial is before else replace(trial, seconds=time.monotonic() - began)


def _judged(change: Change | None, took: float | None, best: float | None) -> tuple[bool, str]:
    """Whether a change is taken that took so long, and the word for it in the table."""
    if took is None:
        return False, "fails"
    if change is None:
        return False, "without a trial"
    gain = FP8_GAIN if change.what == "precision" else 0.0
    return (True, TAKEN) if best is None or took * (1 - gain) < best else (False, "not taken")


def measured(
    spec: TrainSpec, world: World, layout: Layout, way: Way, seen: dict[tuple[Kind, str], float]
) -> float | None:
    """Seconds of a micro-batch forward and backward through all layers on the slowest rank; None if it fails on one.

    Args:
        seen: times of kinds of layers in ways that are the same for them; is added to.
    """
    own: float | None = None
    try:
        own = 0.0
        for kind, count in compiled.counted(spec.model, way.precision, spec.runtime.activation_checkpointing).items():
            key = kind, _as_it_sees(kind, spec, way)
            if key not in seen:
                seen[key] = _seconds(kind, spec, world, layout, way)
            own += count * seen[key]
    except Exception as error:  # of torch, Triton, a package, …
        if unusable(world.device):
            raise
        own = None
        log.warning(
            "trial: %s fails: %s", ", ".join(f"{what} {name}" for what, name in way.names.items()), first_line(error)
        )
    told = world.gather(own)
    return max(took for took in told if took is not None) if None not in told else None


def _as_it_sees(kind: Kind, spec: TrainSpec, way: Way) -> str:
    """The part of a way that this kind of layer depends on: all but backends of operations that it does not have."""
    taken = _Noted(ops.functions(way.choices))
    with torch.device("meta"):
        HybridModel(kind.alone(spec.model), taken)
    return str(sorted(item for item in way.names.items() if item[0] not in OPS or item[0] in taken.names))


class _Noted(dict[str, Callable[..., Any]]):
    """Functions by operation, and the names of those that a model has taken."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(functions)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Callable[..., Any]:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def _seconds(kind: Kind, spec: TrainSpec, world: World, layout: Layout, way: Way) -> float:
    """Of one layer of this kind, the mean over the shapes of the run's micro-batches."""
    device = world.device
    with leaving_nothing(device):
        model = compiled.build_own_share(kind, spec, device, layout, way.precision, way.choices)
        if way.compiles:
            compiled.compile_layers(model)
        if way.graphs and (problem := _records(spec, world, way.precision)):
            raise RuntimeError(problem)
        if way.graphs and (problem := graphed.problem(model, kind, spec, way.precision)):
            raise RuntimeError(problem)
        times = []
        for rows, length in compiled.shapes(spec.tokens, spec.batch):
            batch = micro_batch(model.spec.vocab_size, rows, length, device)
            moments = []
            for _ in range(WARM_UPS + TIMED + 1):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                moments.append(time.perf_counter())
                compiled.gradients(model, batch, way.precision)
            took = [after - before for before, after in pairwise(moments)]
            times.append(statistics.median(took[WARM_UPS:]))
        return statistics.fmean(times)


def _records(spec: TrainSpec, world: World, chosen: Precision) -> str | None:
    return graphed.why_not(world, chosen, spec.runtime.activation_checkpointing)


def digest(spec: TrainSpec, layout: Layout, way: Way, common: list[Change]) -> str:
    """Of everything that the times depend on and the cache's file does not name."""
    about = {
        "model": spec.model.model_dump(mode="json"),
        "rows": compiled.shapes(spec.tokens, spec.batch),
        "layout": str(layout),
        "recomputed": stored(spec.runtime.activation_checkpointing),
        "fp8": spec.precision.fp8.model_dump(mode="json"),
        "way": way.names,
        "changes": common,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def table(trial: Trial) -> list[str]:
    """Lines of equal columns for the log; head and optimizer are not in the times."""
    width = max(len(row.change) for row in trial.rows)
    lines = []
    for row in trial.rows:
        took = f"{row.seconds * 1e3:9.2f} ms" if row.seconds is not None else f"{'':12}"
        lines.append(f"{row.change:{width}} {took}  {row.verdict}")
    return lines

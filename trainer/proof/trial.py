"""A short trial of the proven ways on the run's own shapes: which is the fastest for this model on this machine?

Each kind of layer is built alone (trainer/compiled.py), and one micro-batch of random tokens goes through it forward
and backward a few times. The times of the kinds, each as often as the model has it, are the time of a way. One thing is
changed at a time, from what would be taken without a trial: the backend of each operation, the compiler, FP8. A change
that is faster is kept; FP8 stays only if it is at least FP8_GAIN faster, as it costs accuracy. No rank waits for
another within a trial, so what fails on one is only passed over; the slowest rank's time counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from trainer import compiled, ops, precision
from trainer.compiled import Kind, leaving_nothing, micro_batch
from trainer.distributed import World
from trainer.ops import OPS, Choice, Setting
from trainer.parallel.layout import Layout
from trainer.precision import Precision
from trainer.proof import cache
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)

FP8_GAIN = 0.05  # of the time without it
WARM_UPS, TIMED = 2, 5
ALL_SECONDS = 240.0


class Change(NamedTuple):
    """An operation and its backend; or "compile" and "no"; or "precision" and the rung below FP8."""

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

    @property
    def names(self) -> dict[str, str]:
        """Each choice by its name."""
        own = {"precision": self.precision.name, "compile": "yes" if self.compiles else "no"}
        return own | {op: choice.name for op, choice in self.choices.items()}

    def changed(self, changes: Iterable[Change], spec: TrainSpec, device: torch.device) -> Way:
        way = self
        for what, to in changes:
            if what == "compile":
                way = replace(way, compiles=to == "yes")
            elif what == "precision":
                below = precision.resolve_for_evaluation(spec.precision, precision.device_capability(device))
                way = replace(way, precision=replace(below, reason=f"FP8 is not {FP8_GAIN:.0%} faster here"))
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
    """All rows, the changes that were taken, and the seconds of the trial."""

    rows: list[Row]
    taken: list[Change]
    seconds: float

    @classmethod
    def of(cls, known: dict[str, Any]) -> Trial:
        """As `asdict` has written it."""
        rows, taken = [Row(**row) for row in known["rows"]], [Change(*change) for change in known["taken"]]
        return cls(rows, taken, known["seconds"])


def fastest(
    spec: TrainSpec, world: World, layout: Layout, way: Way, seconds: float = ALL_SECONDS
) -> tuple[Way, Trial | None]:
    """The fastest proven way, and the trial that shows it; a collective of all ranks.

    None where nothing is tried: on a CPU, where `runtime.prove` is off, and where the spec leaves nothing open.

    Args:
        way: what would be taken without a trial.
        seconds: what has not begun by then is not tried.
    """
    own = list(changes(spec, world.device, way)) if _is_wanted(spec, world) else []
    # Ranks whose packages differ have different ones.
    told = [set(offered) for offered in world.gather(own)]
    common = [change for change in world.broadcast(own) if all(change in offered for offered in told)]
    if not common:
        return way, None
    key, places = digest(spec, layout, way, common), cache.files(world.device, spec.run_dir)
    known = world.broadcast(cache.read(places, world.device).trials.get(key) if world.is_main else None)
    trial = Trial.of(known) if known else tried(spec, world, layout, way, common, seconds)
    if world.local_rank == 0:
        content = cache.read(places, world.device)
        content.trials[key] = asdict(trial)
        cache.write(places, content, world.device)
    return way.changed(trial.taken, spec, world.device), trial


def _is_wanted(spec: TrainSpec, world: World) -> bool:
    return spec.runtime.prove and Setting(world.device).device_class != "cpu"


def changes(spec: TrainSpec, device: torch.device, way: Way) -> Iterator[Change]:
    """Each thing that the spec leaves open and that could be otherwise here."""
    setting = Setting(device, way.precision.autocast_dtype or torch.float32, spec.model)
    for op, choice in way.choices.items():
        if getattr(spec.backends, op) == "auto":
            for name, verdict in ops.survey(op, setting).items():
                if name not in ("reference", choice.name) and verdict.problem is verdict.doubt is None:
                    yield Change(op, name)
    if spec.runtime.compile == "auto" and way.compiles:
        yield Change("compile", "no")
    if way.precision.fp8 and spec.precision.dtype == "auto":
        below = precision.resolve_for_evaluation(spec.precision, precision.device_capability(device))
        yield Change("precision", below.name)


def tried(spec: TrainSpec, world: World, layout: Layout, way: Way, common: list[Change], seconds: float) -> Trial:
    """Time the way and each change of it, and keep what is faster."""
    began = time.monotonic()
    best = measured(spec, world, layout, way)
    rows, taken = [Row("as proven", best, "without a trial" if best else "fails")], list[Change]()
    for change in common:
        if world.broadcast(time.monotonic() - began) > seconds:
            rows.append(Row(str(change), None, f"not tried: the trial took longer than {seconds:g} s"))
            continue
        took = measured(spec, world, layout, way.changed([*taken, change], spec, world.device))
        gain = FP8_GAIN if change.what == "precision" else 0.0
        if took is None:
            verdict = "fails"
        elif best is None or took * (1 - gain) < best:
            verdict, best = "taken", took
            taken.append(change)
        else:
            verdict = "not taken"
        rows.append(Row(str(change), took, verdict))
    return Trial(rows, taken, time.monotonic() - began)


def measured(spec: TrainSpec, world: World, layout: Layout, way: Way) -> float | None:
    """Seconds of a micro-batch forward and backward through all layers on the slowest rank; None if it fails on one."""
    own: float | None = None
    try:
        own = sum(
            count * _seconds(kind, spec, world.device, layout, way)
            for kind, count in compiled.counted(spec.model, way.precision).items()
        )
    except Exception as error:  # of torch, Triton, a package, …
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("trial: %s fails: %s", ", ".join(f"{what} {name}" for what, name in way.names.items()), first)
    told = world.gather(own)
    return max(took for took in told if took is not None) if None not in told else None


def _seconds(kind: Kind, spec: TrainSpec, device: torch.device, layout: Layout, way: Way) -> float:
    """Of one layer of this kind, the mean over the shapes of the run's micro-batches."""
    with leaving_nothing(device):
        model = compiled.build_own_share(kind, spec, device, layout, way.precision, way.choices)
        if way.compiles:
            compiled.compile_layers(model)
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


def digest(spec: TrainSpec, layout: Layout, way: Way, common: list[Change]) -> str:
    """Of everything that the times depend on and the cache's file does not name."""
    about = {
        "model": spec.model.model_dump(mode="json"),
        "rows": compiled.shapes(spec.tokens, spec.batch),
        "layout": str(layout),
        "recomputed": spec.runtime.activation_checkpointing,
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

"""The proof of a run: made by the first rank of each node, known to all ranks before they agree on anything."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer import parity
from trainer.distributed import World
from trainer.errors import first_line
from trainer.ops import Setting, packages
from trainer.parity import Record
from trainer.preflight.measured import gibibytes
from trainer.process.failures import node_name
from trainer.proof import cache
from trainer.proof.comparisons import Comparison, missing, wanted
from trainer.proof.prove import GIB, Found, Limits, prove
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)

LEAST_FREE = 2 * GIB  # of a GPU: less belongs to somebody else


@dataclass(frozen=True)
class Proof:
    """The records of a node.

    Attributes:
        comparisons: those that its run may use, but not those of which is known that they cannot run there.
        made: how many of their records were made now; `seconds`: how long that took.
        known: what is kept of this environment; `file`: under that name.
        wrong: kernels that are passed over, a line each.
        problems: why some records are missing or cannot be kept, a line each.
    """

    comparisons: tuple[Comparison, ...] = ()
    records: tuple[Record, ...] = ()
    made: int = 0
    seconds: float = 0.0
    known: cache.Known = field(default_factory=cache.Known)
    file: str = ""
    wrong: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def at_start(spec: TrainSpec, world: World, limits: Limits | None = None) -> dict[str, Proof]:
    """Prove what this run may use and nobody has proven; a collective of all ranks. Does nothing on a CPU.

    The process relies on the records of its node from then on (`trainer.parity.proven`), and does not import what ends
    a process there.

    Returns:
        By node, what its first rank has found.
    """
    if not spec.runtime.prove or Setting(world.device).device_class == "cpu":  # the same on all ranks
        return {}
    if limits is None:  # the other ranks wait for the first one of their node
        patience = min(spec.runtime.communication_timeout_seconds / 2, spec.runtime.hang_timeout_seconds / 4)
        limits = Limits(all_seconds=min(Limits.all_seconds, patience))
    own = None
    if world.local_rank == 0:
        try:
            own = of_node(wanted(spec, world.device), world.device, spec.run_dir, limits)
        except Exception as error:  # of the driver, files, a package; what is proven is enough, and others wait here
            own = Proof(problems=(f"nothing is compared: {first_line(error)}",))
    told = world.gather((node_name(), own))
    if own is not None:
        _keep_beside(spec.run_dir, own, [proof for _, proof in told], world)
    of_mine = told[world.rank - world.local_rank][1]
    if of_mine is not None:
        rely_on(of_mine)
    found = {node: proof for node, proof in told if proof is not None}
    if own is not None:
        _say(node_name(), own)
        log.info("proof: %d comparisons made now (%.1f s)", own.made, own.seconds)
        for line in table(own):
            log.info("proof: %s", line)
    if world.is_main:
        for node, proof in found.items():
            if node != node_name():
                _say(node, proof)
    return found


def rely_on(proof: Proof) -> None:
    """Let this process choose by these records."""
    packages.refuse(proof.known.refused)
    parity.learn(proof.records)


def _keep_beside(run_dir: str, own: Proof, told: list[Proof | None], world: World) -> None:
    """Nodes that write the same file at once could lose what failed on one, so the first writes what all have found."""
    same = {rank: proof for rank, proof in enumerate(told) if proof and proof.file and proof.file == own.file}
    if world.rank != min(same, default=None):
        return
    place, known = Path(run_dir) / own.file, cache.Known()
    for proof in same.values():
        known.add(proof.known)
    if known != cache.read([place], world.device):
        for problem in cache.write([place], known, world.device):
            log.warning("proof: %s", problem)


def remember(device: torch.device, run_dir: str | None = None) -> None:
    """Rely on what has been proven on such a machine, here or in a run, without proving anything."""
    if Setting(device).device_class != "cpu":
        known = cache.read(cache.files(device, run_dir), device)
        packages.refuse(known.refused)
        parity.learn(known.records)


def of_node(comparisons: list[Comparison], device: torch.device, run_dir: str | None, limits: Limits) -> Proof:
    """The records of these comparisons on this device: kept ones, and those that are made now and cached."""
    if Setting(device).device_class == "cpu":  # whose records are committed
        return Proof()
    began = time.monotonic()
    places = cache.files(device, run_dir)
    known = cache.read(places, device)
    packages.refuse(known.refused)
    parity.learn(known.records)
    found = Found()
    absent = missing(comparisons, device, known.unsupported)
    if absent and run_dir:
        known.add(cache.of_other_runs(run_dir, device))
        parity.learn(known.records)
        absent = missing(comparisons, device, known.unsupported)
    if absent and (occupied := _occupied(device)):
        found.problems.append(occupied)
    elif absent:
        log.info("proof: in a process of its own, %s", ", ".join(map(str, absent)))
        found = prove(absent, device, limits, refused=known.refused, slow=known.slow, progress=_progress)
        known.add(cache.Known(found.records, found.unsupported, found.refused, found.slow))
        packages.refuse(found.refused)
        parity.learn(found.records)
    if absent or known != cache.read(places[-1:], device):
        found.problems += cache.write(places[-1:], known, device)
    there = [c for c in comparisons if known.unsupported.get(str(c)) is None]
    records = [record for c in comparisons for record in _records(c, device)]
    kept = " and ".join(map(str, places))
    wrong = [
        f"{record.backend} ({record.op}, {record.variant}, {record.package} {record.version}) is passed over: "
        f"{record.outcome}; to compare it again, remove {kept}"
        for record in records
        if not record.passed
    ]
    wrong += [f"{outcome}, so it is not imported; to try it again, remove {kept}" for outcome in known.refused.values()]
    seconds = time.monotonic() - began
    return Proof(
        comparisons=tuple(there),
        records=tuple(records),
        made=len(found.records),
        seconds=seconds,
        known=known,
        file=places[-1].name,
        wrong=tuple(wrong),
        problems=tuple(found.problems),
    )


def is_of(record: Record, comparison: Comparison) -> bool:
    return (record.op, record.backend, record.variant) == (comparison.op, comparison.backend, comparison.variant)


def table(proof: Proof) -> list[str]:
    """A line of equal columns for each comparison."""
    rows = [(*(c.op, c.backend, c.variant), outcome(proof, c)[1]) for c in proof.comparisons]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{each:{width}}" for each, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def outcome(proof: Proof, comparison: Comparison) -> tuple[bool | None, str]:
    """Whether it has passed (None: it was not compared), and that in words; a failing record counts."""
    of_it = [record for record in proof.records if is_of(record, comparison)]
    if not of_it:
        return None, "not compared"
    worst = min(of_it, key=lambda record: record.passed)
    return worst.passed, worst.outcome


def _records(comparison: Comparison, device: torch.device) -> list[Record]:
    where, version = Setting(device).device_class, parity.package_version(comparison.package)
    return parity.known(comparison.op, comparison.backend, comparison.variant, where, version)


def _say(node: str, proof: Proof) -> None:
    for remark in (*proof.problems, *proof.wrong):
        log.warning("proof on node %s: %s", node, remark)


def _progress(comparison: Comparison, outcome: str) -> None:
    log.debug("proof: %s: %s", comparison, outcome)


def _occupied(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    if free >= LEAST_FREE:
        return None
    return (
        f"nothing is compared, as {device} has {gibibytes(free)} of {gibibytes(total)} free; see nvidia-smi on the "
        "node and end the process that holds the rest"
    )

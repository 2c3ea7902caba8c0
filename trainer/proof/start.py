"""The proof of a run: made by the first rank of each node, known to all ranks before they agree on anything."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from trainer import parity
from trainer.distributed import World
from trainer.ops import Setting
from trainer.parity import Record
from trainer.preflight.measured import gibibytes
from trainer.process.failures import node_name
from trainer.proof import cache
from trainer.proof.comparisons import Comparison, missing, wanted
from trainer.proof.prove import GIB, Limits, prove
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)

LEAST_FREE = 2 * GIB  # of a GPU: less belongs to somebody else


@dataclass(frozen=True)
class Proof:
    """The records of a node.

    Attributes:
        made: how many of them were made now; `seconds`: how long that took.
        wrong: kernels that are passed over, a line each.
        problems: why some records are missing or cannot be kept, a line each.
    """

    records: tuple[Record, ...] = ()
    made: int = 0
    seconds: float = 0.0
    wrong: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def at_start(spec: TrainSpec, world: World, limits: Limits = Limits()) -> Proof:
    """Prove what this run may use and nobody has proven; a collective of all ranks. Does nothing on a CPU.

    The process relies on the records from then on (`trainer.parity.proven`).
    """
    own = None
    if world.local_rank == 0 and spec.runtime.prove:
        own = of_node(wanted(spec, world.device), world.device, spec.run_dir, limits)
    nodes = {node: proof for node, proof in world.gather((node_name(), own)) if proof is not None}
    found = nodes.get(node_name(), Proof())
    parity.learn(found.records)
    if own is not None:
        for remark in (*own.problems, *own.wrong):
            log.warning("proof on node %s: %s", node_name(), remark)
        if own.made:
            log.info("proof on node %s: %d comparisons (%.1f s)", node_name(), own.made, own.seconds)
    return found


def of_node(comparisons: list[Comparison], device: torch.device, run_dir: str | None, limits: Limits) -> Proof:
    """The records of these comparisons on this device: kept ones, and those that are made now and kept."""
    if Setting(device).device_class == "cpu":  # whose records are committed
        return Proof()
    began = time.monotonic()
    places = cache.files(device, run_dir)
    known = cache.read(places)
    parity.learn(known.records)
    made: list[Record] = []
    problems: list[str] = []
    absent = missing(comparisons, device)
    if absent and (occupied := _occupied(device)):
        problems.append(occupied)
    elif absent:
        names = ", ".join(map(str, absent))
        log.info("proof: comparing with the reference, as there is no record of it here: %s", names)
        made, problems = prove(absent, device, limits, progress=_say)
        known.records += made
    if made or (known.records and not places[0].exists()):
        problems += cache.write(places, known, device)
    keys = {(c.op, c.backend, c.variant) for c in comparisons}
    wrong = [
        f"{record.backend} ({record.op}, {record.variant}, {record.package} {record.version}) is passed over: "
        f"{record.outcome}; kept in {places[-1]}"
        for record in known.records
        if not record.passed and (record.op, record.backend, record.variant) in keys
    ]
    return Proof(tuple(known.records), len(made), time.monotonic() - began, tuple(wrong), tuple(problems))


def _say(comparison: Comparison, record: Record) -> None:
    log.info("proof: %s: %s", comparison, record.outcome)


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

"""Checks between the ranks, once they have met: their GPUs, clocks, the links from each to the next, the network."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from trainer.distributed import World
from trainer.errors import CommunicationError
from trainer.preflight import Finding, fabric, gpus, run
from trainer.preflight.measured import GB, Measured, Place
from trainer.process.failures import node_name
from trainer.runtimespec import PreflightSpec

GPU_FLOOR_GB_PER_SECOND = (
    0.1  # 1 Gbit/s: below this NCCL uses the wrong interface; even an overlay network on 10 Gbit/s is faster
)
GPU_SLOW_GB_PER_SECOND, CPU_SLOW_GB_PER_SECOND = 1.0, 0.02
LINKS_NAMED = 4
_GPU_BYTES, _CPU_BYTES, _ROUNDS = 64 * 2**20, 4 * 2**20, 3


def of_ranks(limits: PreflightSpec, world: World) -> list[Finding]:
    """Run all checks between ranks; every rank calls this.

    Raises:
        CommunicationError, SpecError: a link, a clock or the network, on all ranks.
        GpuError: a GPU, on its own rank.
    """
    if not limits.enabled:
        return []
    checks = {}
    if world.device.type == "cuda":
        checks["gpu"] = lambda: gpus.computes(world.device)
    if world.size > 1:
        checks["clocks"] = lambda: clocks(world, limits.max_clock_skew_seconds)
        checks["links"] = lambda: links(world, limits.min_link_gb_per_second)
        checks["network"] = lambda: fabric.network(limits.fabric, world)
    return run(checks) if checks else []


def clocks(world: World, most_seconds: float) -> Measured:
    """Compare the ranks' clocks: deadline, lease and checkpoint ages are wall times.

    Raises:
        CommunicationError: one is further than `most_seconds` from another.
    """
    for _ in range(_ROUNDS):  # a process that was not scheduled for a while looks like a clock that is ahead
        world.barrier()
        here = (Place(world.rank, node_name()), time.time())
        times = sorted(world.gather(here), key=lambda entry: entry[1])
        spread = times[-1][1] - times[0][1]
        if spread <= most_seconds:
            break
    else:
        middle = statistics.median(moment for _, moment in times)
        early, late = times[0], times[-1]
        (wrong, moment), (other, reference) = (early, late) if middle - early[1] > late[1] - middle else (late, early)
        raise CommunicationError(
            f"the clock of {wrong} is {abs(moment - reference):.1f} s {'ahead of' if moment > reference else 'behind'} "
            f"that of {other}, {most_seconds:g} s are allowed (train.runtime.preflight.max_clock_skew_seconds); "
            "fix time synchronisation (NTP, chrony) on that node",
        )
    return Measured(f"clocks within {spread:.2f} s")


def links(world: World, floor_gb_per_second: float | None) -> Measured:
    """Let every rank send to the next one at the same time, and check what arrives.

    All links of a ring carry data at once, as in a ring all-reduce; a slow one slows only the two ranks at its ends.

    Raises:
        CommunicationError: a link is slower than the floor (on a CPU only if the spec names one), or loses data.
    """
    on_gpu = world.device.type == "cuda"
    count = _GPU_BYTES if on_gpu else _CPU_BYTES
    outgoing = torch.full((count // 4,), float(world.rank), device=world.device)
    incoming = torch.empty_like(outgoing)
    previous = (world.rank - 1) % world.size
    seconds = []
    for _ in range(1 + _ROUNDS):  # the first one also builds the connections
        world.barrier()
        began = time.perf_counter()
        _pass_on(world, outgoing, incoming)
        seconds.append(time.perf_counter() - began)
    intact = bool((incoming == float(previous)).all())
    results = world.gather((Place(world.rank, node_name()), min(seconds[1:]), intact))
    places = [place for place, _, _ in results]
    if broken := next((place for place, _, whole in results if not whole), None):
        raise CommunicationError(
            f"{broken} received other data than {places[broken.rank - 1]} has sent; drain the node of one of them",
        )
    # A rank is done when both its links are, so a link is at least as fast as the faster of its two ends says.
    rates = {(places[i - 1], places[i]): count / min(results[i - 1][1], results[i][1]) for i in range(world.size)}
    slowest = min(rates.values())
    floor = floor_gb_per_second or (GPU_FLOOR_GB_PER_SECOND if on_gpu else None)
    if floor and slowest < floor * GB:
        remedy = "NCCL_DEBUG=INFO shows its way" if on_gpu else "look at the network between them"
        raise CommunicationError(
            f"{_named(rates, floor)}, the floor is {floor:g}: {remedy}; drain a bad node, or lower "
            "train.runtime.preflight.min_link_gb_per_second",
        )
    warning = None
    slow = GPU_SLOW_GB_PER_SECOND if on_gpu else CPU_SLOW_GB_PER_SECOND
    if slowest < slow * GB:
        warning = f"{_named(rates, slow)}, less than {slow:g}; steps will wait"
    return Measured(f"links {slowest / GB:.2f} GB/s or more", slowest, warning)


def _named(rates: dict[tuple[Place, Place], float], floor: float) -> str:
    """The links below `floor`, the slowest first; two that share a rank point at it."""
    slow = sorted((rate, pair) for pair, rate in rates.items() if rate < floor * GB)
    told = ", ".join(f"{a} → {b} carries {rate / GB:.3f} GB/s" for rate, (a, b) in slow[:LINKS_NAMED])
    more = f" and {len(slow) - LINKS_NAMED} more" if len(slow) > LINKS_NAMED else ""
    return f"link {told}{more}"


def _pass_on(world: World, outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
    following, previous = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    operations = [dist.P2POp(dist.isend, outgoing, following), dist.P2POp(dist.irecv, incoming, previous)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    if outgoing.is_cuda:
        torch.cuda.synchronize(outgoing.device)

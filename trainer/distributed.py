"""From torchrun's environment to a process group: ranks, device, threads, seeds, timeouts.

There is always a process group, even of one process, so that other code need not check for one. The training loop and
the checkpoint thread must not share a group, because two threads would mix the order of collectives.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer import nccllog
from trainer.errors import CommunicationError, SpecError
from trainer.process.failures import node_name
from trainer.runtimespec import RuntimeSpec

log = logging.getLogger(__name__)

T = TypeVar("T")
_DNS_RETRY_SECONDS = (1.0, 2.0, 5.0)  # then every 5 s: failed names are cached for that long
_WAIT_SAID_SECONDS = 60.0


@dataclass(frozen=True)
class World:
    """The ranks of the run as seen by this process.

    Attributes:
        rank, size: over all machines; `local_rank`, `local_size`: on this one.
        control: gloo group of the loop, for objects and barriers; `background`: that of the checkpoint thread.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup
    background: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)


def start(runtime: RuntimeSpec, seed: int, *, one_backend: bool = False) -> World:
    """Join the process group of torchrun's variables (without them: one process) and choose the device.

    Args:
        one_backend: the group has that of the device alone, as a library expects that asks for its name.

    Raises:
        SpecError: runtime.device requires a GPU that is missing on this rank or another.
    """
    environment = {name: int(os.environ.get(name, default)) for name, default in _ALONE.items()}
    rank, size = environment["RANK"], environment["WORLD_SIZE"]
    local_rank, local_size = environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]
    timeout = timedelta(seconds=runtime.communication_timeout_seconds)
    if "MASTER_ADDR" in os.environ:
        store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=timeout)))
        store.set_timeout(timeout)
    elif size > 1:
        raise SpecError(f"WORLD_SIZE is {size} without MASTER_ADDR; start it by trainer.entrypoint")
    else:
        store = dist.HashStore()
    device = agreed_device(runtime.device, rank, size, local_rank, store)
    _settle(device, local_size)
    torch.manual_seed(seed + rank)
    both = "nccl" if one_backend else "cpu:gloo,cuda:nccl"
    backend = both if device.type == "cuda" else "gloo"
    on_gpu = {"device_id": device} if device.type == "cuda" else {}
    if device.type == "cuda" and runtime.preflight.enabled and size > 1:
        nccllog.begin()
    group_store = dist.PrefixStore("world", store)
    dist.init_process_group(backend, timeout=timeout, store=group_store, rank=rank, world_size=size, **on_gpu)
    control = dist.new_group(backend="gloo", timeout=timeout)
    background = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, local_rank, local_size, device, control, background)


_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def stop() -> None:
    """Leave the process group, after a barrier, because peers that still communicate with this process would fail."""
    dist.destroy_process_group()


def wait_for_host(host: str, timeout_seconds: float) -> None:
    """Wait until `host` resolves: the DNS name of a pod exists only some seconds after the pod itself.

    Raises:
        CommunicationError: it did not resolve in time.
    """
    deadline = time.monotonic() + timeout_seconds
    attempt, next_said = 0, 0.0
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            pause = _DNS_RETRY_SECONDS[min(attempt, len(_DNS_RETRY_SECONDS) - 1)]
            attempt += 1
            if time.monotonic() + pause > deadline:
                raise CommunicationError(
                    f"rendezvous host {host} has no address after {timeout_seconds:.0f} s ({error.strerror}); "
                    "is its pod there, and its headless service?",
                ) from None
            if time.monotonic() >= next_said:  # its pod may queue for hours
                log.info("rendezvous host %s has no address yet; still trying", host)
                next_said = time.monotonic() + _WAIT_SAID_SECONDS
            time.sleep(pause)


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device for `RuntimeSpec.device`; `auto` takes the GPU of this local rank if there is one.

    Raises:
        SpecError: `cuda` is required but missing.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SpecError("train.runtime.device is cuda but this machine has no usable GPU; write auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise SpecError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} here); "
            "lower the processes per node",
        )
    return torch.device("cuda", local_rank)


def agreed_device(wanted: str, rank: int, size: int, local_rank: int, store: dist.Store) -> torch.device:
    """`pick_device`, with the same device type on all ranks: under `auto` the CPU if any rank has no GPU.

    Uses the store, because the process group depends on the device.

    Raises:
        SpecError: as `pick_device`, on every rank, with the error of the first failing rank.
    """
    own, problem = "", ""
    try:
        own = pick_device(wanted, local_rank).type
    except SpecError as error:
        problem = str(error)
    place = f"rank {rank} on {node_name()}"
    store.set(f"device/{rank}", json.dumps([own, problem, place]))
    told = [json.loads(store.get(f"device/{other}")) for other in range(size)]
    if refused := next(((said, at) for _, said, at in told if said), None):
        said, at = refused
        raise SpecError(said if all(one[1] == said for one in told) else f"{said} (so says {at})")
    without = next((at for kind, _, at in told if kind == "cpu"), None)
    if without and any(kind != "cpu" for kind, _, _ in told) and rank == 0:
        log.warning("train.runtime.device: all ranks take the CPU, as %s has no usable GPU; others have one", without)
    return torch.device("cpu") if without else pick_device(wanted, local_rank)


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU, whose memory is shared by the machine's ranks."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _settle(device: torch.device, local_size: int) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return
    threads = os.environ.get("OMP_NUM_THREADS") or ("1" if local_size > 1 else None)
    if threads:  # processes that each use all shared cores are many times slower
        torch.set_num_threads(int(threads))
    # The same sums in the same order, so that a resumed run is bit-identical to an uninterrupted one. Not
    # torch.use_deterministic_algorithms, which imports the compiler to set it there: a second of an evaluation. If the
    # compiler is used, trainer/model/compiling.py sets it.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False

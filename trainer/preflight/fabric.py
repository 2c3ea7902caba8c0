"""Look at the network between nodes: which one NCCL or gloo took, and how much memory may be locked for it."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import nccllog
from trainer.errors import CommunicationError, SpecError
from trainer.fabric import NETWORKS, FabricName
from trainer.preflight.measured import GIB, Measured, Place, gibibytes
from trainer.process.failures import node_name

if TYPE_CHECKING:
    from trainer.distributed import World

CARDS = Path("/dev/infiniband")  # what a container was given, unlike /sys, which shows the node's
ENOUGH_LOCKED = 1 * GIB  # buffers of 8 GPUs' channels take hundreds of MiB
DEVICES_NAMED = 4
SOCKET = "Socket"
FIELD = "train.runtime.preflight.fabric"
_SIOCGIFADDR = 0x8915
# The lines of NCCL 2.19 to 2.29 and of its plugins.
_NETWORK = re.compile(r"NCCL INFO (?:Using network (.+?)|Assigned NET plugin (.+?) to comm)\s*$", re.MULTILINE)
_USING = re.compile(r"NCCL INFO NET/(IB|Socket) ?: Using ?(.*)$", re.MULTILINE)
_CARD = re.compile(r"\[\d+\]\s*([\w.@-]+:\d+/\w+)")
_INTERFACE = re.compile(r"\[\d+\]\s*([^\s:\[\]]+):(\S+?)<\d+>")
_PROVIDER = re.compile(r"NET/OFI Selected provider is ([\w.-]+)(?:.*found (\d+) nics)?", re.IGNORECASE)
_DIRECT = re.compile(r"via NET/.*/GDRDMA")


@dataclass(frozen=True)
class Taken:
    """What NCCL took: its name of the network, the devices, and whether a card reads GPU memory directly."""

    network: str = ""
    devices: tuple[str, ...] = ()
    is_direct: bool = False

    def __str__(self) -> str:
        if not self.network:
            return "a network that its log does not name"
        more = f" and {len(self.devices) - DEVICES_NAMED} more" if len(self.devices) > DEVICES_NAMED else ""
        details = [", ".join(self.devices[:DEVICES_NAMED]) + more] if self.devices else []
        details += ["GPU Direct"] if self.is_direct else []
        return f"{self.network} ({'; '.join(details)})" if details else self.network

    def is_fabric(self, wanted: FabricName) -> bool:
        """Whether this is the network `wanted`; all devices must be of its kind."""
        network = NETWORKS[wanted]
        return self.network.lower().startswith(network.names) and all(network.device in one for one in self.devices)


def parse(log: str) -> Taken:
    """What a log of NCCL_DEBUG=INFO says; an empty `network` if it does not say."""
    named = [first or second for first, second in _NETWORK.findall(log)]
    network = named[-1] if named else ""
    found: dict[str, tuple[str, ...]] = {}
    for transport, text in _USING.findall(log):
        matches = _CARD.findall(text) if transport == "IB" else [":".join(pair) for pair in _INTERFACE.findall(text)]
        found[transport] = tuple(matches)
    if provider := _PROVIDER.search(log):
        found["OFI"] = (f"{provider[1]} × {provider[2]}" if provider[2] else provider[1],)
    family = "IB" if network.upper().startswith("IB") else network if network == SOCKET else "OFI"
    return Taken(network, found.get(family, ()), bool(_DIRECT.search(log)))


def network(wanted: FabricName | None, world: World) -> Measured:
    """The network that the ranks took; every rank calls this, after they have talked to each other.

    Raises:
        SpecError: another network than `wanted` on all ranks, or NCCL's log cannot be read.
        CommunicationError: another network on some ranks.
    """
    if world.device.type != "cuda":
        return Measured(f"gloo over {gloo_interface()}")
    log = nccllog.read()
    told = world.gather((Place(world.rank, node_name()), parse(log) if log is not None else None, cards()))
    places = {place: taken for place, taken, _ in told if taken is not None}
    if wanted and len(places) < world.size:
        raise SpecError(
            f"NCCL_DEBUG is set and its lines go to stdout, where nothing sees whether NCCL takes {wanted} ({FIELD}); "
            "add NCCL_DEBUG_FILE=/tmp/nccl.%p.log to cluster.env, or remove NCCL_DEBUG"
        )
    if wanted and (others := {place: taken for place, taken in places.items() if not taken.is_fabric(wanted)}):
        place, taken = next(iter(others.items()))
        if len(others) == world.size:
            raise SpecError(
                f"NCCL took {taken} instead of {wanted} ({FIELD}): {_remedy(taken, wanted)}; fabric: none takes any "
                "network"
            )
        more = f" and {len(others) - 1} more" if others.keys() - {place} else ""
        raise CommunicationError(
            f"NCCL took {taken} instead of {wanted} ({FIELD}) on {place}{more}; other ranks have it: look at the cards "
            "of that node, or drain it"
        )
    here = next((taken for place, taken in places.items() if place.rank == world.rank), None)
    if here is None or len({place.node for place, _, _ in told}) == 1:
        return Measured()  # within a node NCCL needs no network
    unused = next(
        (f"{card} on {place}" for place, taken, card in told if card and taken and taken.network == SOCKET), None
    )
    warning = f"NCCL took {here} although there are RDMA cards ({unused}); see cluster.fabric" if unused else None
    return Measured(f"NCCL over {here}", warning=warning)


def _remedy(taken: Taken, wanted: FabricName) -> str:
    meant = [one.partition(":")[0] for one in taken.devices if NETWORKS[wanted].device in one]
    if meant and "IB" in taken.network:  # NCCL takes all cards of a node, those for storage too
        return f"cards of other networks are among them; name yours in cluster.env: NCCL_IB_HCA: '={','.join(meant)}'"
    return (
        "are the cards in the pods (cluster.resources), is their library or NCCL's plugin in the image, does "
        "cluster.env keep NCCL from them?"
    )


def cards() -> str:
    """The first RDMA device of this container, "" without one."""
    return min((entry.name for entry in CARDS.glob("uverbs*")), default="") if CARDS.is_dir() else ""


def gloo_interface() -> str:
    """Name and address of the interface that torch's gloo takes: GLOO_SOCKET_IFNAME, else that of the host's name."""
    if named := os.environ.get("GLOO_SOCKET_IFNAME"):
        return named
    try:
        address = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:  # gloo takes the loopback then
        address = "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return f"{name} ({address})"
    return str(address)


def locked_memory(wanted: FabricName | None) -> Measured:
    """The limit of memory that a process may lock, where a network registers memory with its cards."""
    if not (NETWORKS[wanted].registers if wanted else cards()):
        return Measured()
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Measured("locked memory unlimited")
    text = f"locked memory {gibibytes(limit)}"
    if limit >= ENOUGH_LOCKED:
        return Measured(text)
    remedy = "set LimitMEMLOCK=infinity for the node's container runtime, or cluster.ulimits.memlock: -1"
    return Measured(text, warning=f"{text} is the limit, too little to register buffers with RDMA cards; {remedy}")

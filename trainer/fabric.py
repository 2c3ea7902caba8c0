"""Networks between nodes by name, and how NCCL names what it takes of them. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

FabricName = Literal["infiniband", "roce", "efa", "tcpx", "tcpxo"]


class Network(NamedTuple):
    """What NCCL's log says where it uses a fabric.

    Attributes:
        names: beginnings of NCCL's name of the network, in small letters; plugins add their own endings: IBext_v8.
        device: what the name of each device contains: its link layer, or the provider of libfabric.
        registers: whether it pins memory of the process, so that the limit of locked memory counts.
    """

    names: tuple[str, ...]
    device: str
    registers: bool


NETWORKS: dict[FabricName, Network] = {
    "infiniband": Network(("ib",), "/IB", True),
    "roce": Network(("ib",), "/RoCE", True),
    "efa": Network(("aws libfabric", "libfabric", "ofi"), "efa", True),
    "tcpx": Network(("gpudirecttcpx",), "", False),
    "tcpxo": Network(("fastrak",), "", False),
}

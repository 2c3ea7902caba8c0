"""Which network NCCL took, read from lines of its log as its versions write them."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import nccllog
from trainer.errors import ForeseenError
from trainer.exitcodes import ExitCode
from trainer.fabric import NETWORKS
from trainer.preflight import fabric
from trainer.preflight.fabric import Taken, parse

SOCKETS = """
w-0:61:61 [0] NCCL INFO Bootstrap: Using eth0:10.244.0.9<0>
w-0:61:79 [0] NCCL INFO NET/IB : No device found.
w-0:61:79 [0] NCCL INFO NET/Socket : Using [0]eth0:10.244.0.9<0> [1]net1:fe80::42:1%net1<0>
w-0:61:79 [0] NCCL INFO Initialized NET plugin Socket
w-0:61:79 [0] NCCL INFO Assigned NET plugin Socket to comm
w-0:61:79 [0] NCCL INFO Using network Socket
w-0:61:79 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/Socket/0
"""
INFINIBAND = """
w-0:61:61 [0] NCCL INFO Bootstrap : Using eth0:10.224.3.48<0>
w-0:61:79 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [2]mlx5_4:1/IB \
[3]mlx5_5:1/IB [4]mlx5_6:1/IB [RO]; OOB eth0:10.224.3.48<0>
w-0:61:79 [0] NCCL INFO Using non-device net plugin version 0
w-0:61:79 [0] NCCL INFO Using network IB
w-0:61:93 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA
"""
SHARP = """
w-0:61:79 [0] NCCL INFO NET/Plugin: Loaded net plugin NCCL RDMA Plugin v8 (v8)
w-0:61:79 [0] NCCL INFO P2P plugin IBext_v8
w-0:61:79 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB/SHARP [1]mlx5_1:1/IB/SHARP [RO]; OOB ibp25s0:10.20.0.119<0>
w-0:61:79 [0] NCCL INFO Using network IBext_v8
"""
MERGED = """
w-0:61:79 [0] NCCL INFO NET/IB : Using [0]={[0] mlx5_2:1/RoCE, [1] mlx5_3:1/RoCE} \
[1]mlx5_bond_0:1/RoCE [RO]; OOB bond0.526:169.136.106.9<0>
w-0:61:79 [0] NCCL INFO Using network IB
"""
MIXED = SHARP.replace(" [RO]", " [2]mlx5_2:1/RoCE [RO]")  # that one for storage
EFA = """
w-0:61:79 [0] NCCL INFO NET/Plugin: Loaded net plugin AWS Libfabric (v9)
w-0:61:79 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.14.0
w-0:61:79 [0] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 32 nics)
w-0:61:79 [0] NCCL INFO Using network Libfabric
w-0:61:93 [0] NCCL INFO Channel 00/0 : 7[7] -> 8[0] [send] via NET/Libfabric/0/GDRDMA
"""
OLD_EFA = """
w-0:61:79 [0] NCCL INFO NET/OFI Selected Provider is efa (found 4 nics)
w-0:61:79 [0] NCCL INFO Using network AWS Libfabric
"""
OFI_OVER_TCP = EFA.replace("is efa, fabric is efa-direct (found 32 nics)", "is tcp, fabric is 10.0.0.0/8")
FASTRAK = "x:1:1 [0] NCCL INFO NET/FasTrak plugin initialized\nx:1:1 [0] NCCL INFO Using network FasTrak\n"
TCPX = "x:1:1 [0] NCCL INFO Using network GPUDirectTCPX_v7\n"
ADDRESSES = ("eth0:10.244.0.9", "net1:fe80::42:1%net1")
FIVE = tuple(f"mlx5_{index}:1/IB" for index in (0, 1, 4, 5, 6))


@pytest.mark.parametrize(
    ("log", "taken", "is_what", "told"),
    [
        (SOCKETS, Taken("Socket", ADDRESSES), (), f"Socket ({', '.join(ADDRESSES)})"),
        (
            INFINIBAND,
            Taken("IB", FIVE, is_direct=True),
            ("infiniband",),
            "IB (mlx5_0:1/IB, mlx5_1:1/IB, mlx5_4:1/IB, mlx5_5:1/IB and 1 more; GPU Direct)",
        ),
        (SHARP, Taken("IBext_v8", FIVE[:2]), ("infiniband",), "IBext_v8 (mlx5_0:1/IB, mlx5_1:1/IB)"),
        (
            MERGED,
            Taken("IB", ("mlx5_2:1/RoCE", "mlx5_3:1/RoCE", "mlx5_bond_0:1/RoCE")),
            ("roce",),
            "IB (mlx5_2:1/RoCE, mlx5_3:1/RoCE, mlx5_bond_0:1/RoCE)",
        ),
        (MERGED + INFINIBAND.replace("mlx5_1:1/IB", "mlx5_1:1/RoCE"), None, (), None),
        (EFA, Taken("Libfabric", ("efa × 32",), is_direct=True), ("efa",), "Libfabric (efa × 32; GPU Direct)"),
        (OLD_EFA, Taken("AWS Libfabric", ("efa × 4",)), ("efa",), "AWS Libfabric (efa × 4)"),
        (OFI_OVER_TCP, Taken("Libfabric", ("tcp",), is_direct=True), (), "Libfabric (tcp; GPU Direct)"),
        (FASTRAK, Taken("FasTrak"), ("tcpxo",), "FasTrak"),
        (TCPX, Taken("GPUDirectTCPX_v7"), ("tcpx",), "GPUDirectTCPX_v7"),
        ("", Taken(), (), "a network that its log does not name"),
    ],
)  # fmt: skip
def test_a_log_says_which_network_is_taken(log: str, taken: Taken | None, is_what: tuple, told: str | None) -> None:
    found = parse(log)
    assert found == (taken or found) and str(found) == (told or str(found))
    assert tuple(name for name in NETWORKS if found.is_fabric(name)) == is_what


def test_the_lines_are_those_of_the_installed_nccl() -> None:
    """Its format strings, as they are in the library."""
    package = find_spec("nvidia.nccl") if find_spec("nvidia") else None
    places = list(package.submodule_search_locations or []) if package else []
    library = next((path for place in places for path in Path(place).glob("lib/libnccl.so*")), None)
    if library is None:
        pytest.skip("NCCL is not installed")
    inside = library.read_bytes()
    for line in (
        "Using network %s",
        "Assigned NET plugin %s to comm",
        "NET/IB : Using%s %s; OOB %s:%s",
        "NET/Socket : Using%s",
    ):
        assert line.encode() + b"\0" in inside, line
    assert (
        re.search(rb"Channel %02d/%d : %d\[%d\] -> %d\[%d\] \[send\] via NET/%s/%d", inside) and b"/GDRDMA\0" in inside
    )


class Ranks:
    """A world of ranks on GPUs, one a node, of which this is the first; the others have these logs."""

    def __init__(self, *logs: str | None) -> None:
        self.rank, self.size, self.logs, self.device = 0, len(logs), logs, SimpleNamespace(type="cuda")

    def gather(self, own: Any) -> list[Any]:
        place, _, card = own
        others = [None if log is None else parse(log) for log in self.logs]
        return [(type(place)(rank, f"node-{rank}"), taken, card) for rank, taken in enumerate(others)]


def asked(monkeypatch: pytest.MonkeyPatch, wanted: str | None, *logs: str | None):
    monkeypatch.setattr(nccllog, "read", lambda: logs[0])
    return fabric.network(wanted, Ranks(*logs))


def test_the_network_that_was_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, "infiniband", INFINIBAND, INFINIBAND)
    assert found.text == f"NCCL over {parse(INFINIBAND)}" and found.warning is None


@pytest.mark.parametrize(
    ("wanted", "logs", "code", "said"),
    [
        ("infiniband", (SOCKETS, SOCKETS), ExitCode.SPEC, "net1:fe80::42:1%net1) instead of infiniband"),
        ("roce", (INFINIBAND, INFINIBAND), ExitCode.SPEC, "instead of roce"),
        ("infiniband", (MIXED, MIXED), ExitCode.SPEC, "in cluster.env: NCCL_IB_HCA: '=mlx5_0,mlx5_1'; fabric: none"),
        ("efa", ("", ""), ExitCode.SPEC, "NCCL took a network that its log does not name instead of efa"),
        ("infiniband", (INFINIBAND, SOCKETS), ExitCode.COMMUNICATION, "preflight.fabric) on rank 1 on node-1; other"),
        ("infiniband", (INFINIBAND, None), ExitCode.SPEC, "add NCCL_DEBUG_FILE=/tmp/nccl.%p.log to cluster.env"),
    ],
)  # fmt: skip
def test_another_network_ends_the_start(monkeypatch: pytest.MonkeyPatch, wanted, logs, code, said: str) -> None:
    with pytest.raises(ForeseenError) as ended:
        asked(monkeypatch, wanted, *logs)
    assert ended.value.code == code and said in str(ended.value) and "\n" not in str(ended.value)


def test_sockets_beside_cards_are_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fabric, "CARDS", tmp_path)
    assert asked(monkeypatch, None, SOCKETS, SOCKETS).warning is None
    (tmp_path / "uverbs0").touch()
    found = asked(monkeypatch, None, SOCKETS, SOCKETS)
    assert found.text.startswith("NCCL over Socket") and "RDMA cards (uverbs0 on rank 0 on node-0)" in found.warning
    assert asked(monkeypatch, None, INFINIBAND, INFINIBAND).warning is None
    assert asked(monkeypatch, None, SOCKETS).text == "", "a single node needs no network"


def test_little_locked_memory_is_a_warning_where_cards_need_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fabric, "CARDS", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 * 2**20, before[1]))
        assert fabric.locked_memory(None) == fabric.locked_memory("tcpxo"), "neither has cards that register memory"
        for wanted in ("infiniband", "roce", "efa"):
            found = fabric.locked_memory(wanted)
            assert found.text == "locked memory 8 MiB" and "LimitMEMLOCK=infinity" in found.warning
        (tmp_path / "uverbs0").touch()
        assert fabric.locked_memory(None).warning
        if before[1] == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, before[1:] * 2)
            assert fabric.locked_memory("roce").text == "locked memory unlimited"
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def test_nccl_writes_where_it_can_be_read_unless_the_user_decides(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from trainer import nccllog
nccllog.begin()
file = os.environ.get("NCCL_DEBUG_FILE", "")
if file:
    host = os.uname().nodename.split(".")[0]
    Path(file.replace("%p", str(os.getpid())).replace("%h", host)).write_text("NCCL INFO Using network IB")
print(os.environ["NCCL_DEBUG"], nccllog.read(), bool(file) and os.path.exists(os.path.dirname(file)))
"""
    for own, expected in (
        ({}, "INFO NCCL INFO Using network IB False"),
        ({"NCCL_DEBUG": "WARN"}, "WARN None False"),
        ({"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{tmp_path}/%h.%p"}, "INFO NCCL INFO Using network IB True"),
    ):
        environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), **own}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            cwd=Path(nccllog.__file__).parents[1],
        )
        assert done.stdout.strip() == expected, done.stderr


def test_gloos_interface_is_the_one_with_the_hosts_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(fabric.socket, "gethostname", lambda: "127.0.0.1")
    assert fabric.gloo_interface() == "lo (127.0.0.1)"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert fabric.gloo_interface() == "eth7"

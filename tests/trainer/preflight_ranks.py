"""One of three ranks of the preflight tests: runs the checks between ranks with one fault after another.

Each rank prints the result of a case as JSON; `NODE_NAME` is the machine on which it pretends to be.
"""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import torch.distributed as dist

from trainer import distributed
from trainer.errors import ForeseenError
from trainer.preflight import ranks
from trainer.runtimespec import PreflightSpec, RuntimeSpec

FAULTY = 1
pass_on = ranks._pass_on


def late(world, outgoing, incoming):
    """What the faulty rank sends takes 0.4 s longer; what it receives does not."""
    if world.rank != FAULTY:
        return pass_on(world, outgoing, incoming)
    dist.recv(incoming, (world.rank - 1) % world.size)
    time.sleep(0.4)
    dist.send(outgoing, (world.rank + 1) % world.size)


def losing(world, outgoing, incoming):
    pass_on(world, outgoing, incoming)
    if world.rank == FAULTY:
        incoming[7] = -1


def main() -> None:
    world = distributed.start(RuntimeSpec(device="cpu", communication_timeout_seconds=60), seed=0)
    shift = 60.5 if world.rank == FAULTY else 0  # told as 60.x, if the ranks were asked within half a second
    skewed = SimpleNamespace(time=lambda: time.time() + shift, perf_counter=time.perf_counter)
    found = {}
    for case, patches, limits in (
        ("sound", {}, {}),
        ("skewed", {"time": skewed}, {}),
        ("slow", {"_pass_on": late}, {}),
        ("below the floor", {"_pass_on": late}, {"min_link_gb_per_second": 0.012}),
        ("losing", {"_pass_on": losing}, {}),
    ):
        before = {name: getattr(ranks, name) for name in patches}
        for name, value in patches.items():
            setattr(ranks, name, value)
        try:
            findings = ranks.of_ranks(PreflightSpec(**limits), world)
            found[case] = [vars(finding) for finding in findings]
        except ForeseenError as error:
            found[case] = [error.code, str(error)]
        for name, value in before.items():
            setattr(ranks, name, value)
        world.barrier()
    with open(os.environ["RESULT"], "w", encoding="utf-8") as stream:
        json.dump(found, stream)

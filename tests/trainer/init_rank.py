"""Build the requested model as rank 0 of 64, the others of which do not exist: what it holds, and its peak memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch._dynamo  # meta kernels import it, which costs memory that is not the model's
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from manifests.spec import load_job
from trainer.model.hybrid import build_model
from trainer.optim.shares import local
from trainer.parallel.layout import Layout
from trainer.parallel.mesh import Mesh


def peak() -> int:
    """Peak memory of this process in bytes, since its peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    spec = load_job("h100-4b").train.model
    dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    mesh = Mesh(Layout(**json.loads(sys.argv[1])), torch.device("cpu"))
    build_model(load_job("tiny").train.model, seed=1, token_classes=[0])
    Path("/proc/self/clear_refs").write_text("5")  # so that only what follows is measured
    before = peak()
    model = build_model(spec, seed=1, token_classes=[0], share=lambda model: mesh.share(model, None))
    grown = peak() - before
    own = [local(parameter) for parameter in model.parameters()]
    print(json.dumps({"held": 4 * sum(tensor.numel() for tensor in own), "grown": grown}))

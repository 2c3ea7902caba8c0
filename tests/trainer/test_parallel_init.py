"""The requested model, built as one rank of 64: in one process that only believes in the other ranks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from manifests.spec import load_job
from trainer.arithmetic.memory import training_memory
from trainer.parallel.layout import Layout

MIB = 2**20
# Rank 0 holds the most. /proc's peak is reset, so that only what follows is measured.
PROGRAM = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
import torch._dynamo  # meta kernels import it, which costs memory that is not the model's
from torch.testing._internal.distributed.fake_pg import FakeStore
from manifests.spec import load_job
from trainer.model.hybrid import build_model
from trainer.optim.shares import local
from trainer.parallel.layout import Layout
from trainer.parallel.mesh import Mesh

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

spec = load_job("h100-4b").train.model
dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
mesh = Mesh(Layout(**json.loads(sys.argv[1])), torch.device("cpu"))
build_model(load_job("tiny").train.model, seed=1, token_classes=[0])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
model = build_model(spec, seed=1, token_classes=[0], share=lambda model: mesh.share(model, None))
grown = peak() - before
own = [local(parameter) for parameter in model.parameters()]
print(json.dumps({"held": 4 * sum(tensor.numel() for tensor in own), "grown": grown}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(64, "fsdp", 64), Layout(64, "fsdp", 64, expert=32)],
    ids=str,
)
def test_no_rank_ever_holds_the_whole_model(layout: Layout):
    command = [sys.executable, "-c", PROGRAM, json.dumps(vars(layout))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    spec = load_job("h100-4b").train.model
    assert measured["held"] == training_memory(spec, layout=layout).weights, "what the arithmetic says"
    assert measured["held"] < training_memory(spec).weights / 25
    assert measured["grown"] < measured["held"] + 160 * MIB, "beyond it: a block, token classes, 1,500 small objects"

"""One of three ranks on two nodes: the second computes something else with one kernel, and is slow with another.

Both nodes write beside the same run, as on a shared volume. Triton's interpreter is a device class without records.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import micro
import proof_child
import torch

from trainer import agreement, distributed, parity, precision
from trainer.ops import OPS, Backend
from trainer.ops.attention import attention_sdpa
from trainer.parallel.layout import Layout
from trainer.proof import prove, start, trial
from trainer.proof.comparisons import Comparison
from trainer.proof.process import Child
from trainer.proof.trial import Way

CPU = torch.device("cpu")


# Of a layer, by kernel and node.
SECONDS = {"steady": {"node-0": 3.0, "node-1": 3.0}, "uneven": {"node-0": 1.0, "node-1": 9.0}}


def main() -> None:
    file, data, directory = map(Path, sys.argv[1:])
    others = {op: "reference" for op in OPS if op != "attention"}
    spec = micro.micro_spec(data, directory / "run", runtime={"preflight": {"enabled": False}}, backends=others)
    world = distributed.start(spec.runtime, seed=0)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("trainer").addHandler(handler)
    logging.getLogger("trainer").setLevel(logging.INFO)
    children = []

    def child(*arguments: object) -> Child:
        children.append(arguments)
        return Child(*arguments)

    def prepared() -> dict:
        children.clear()
        lines.clear()
        parity.forget()
        proofs = start.at_start(spec, world)
        choice = agreement.backends(spec, world, None)["attention"]
        made = {node: proof.made for node, proof in proofs.items()}
        return {"made": made, "children": len(children), "log": list(lines), **choice._asdict()}

    attention = OPS["attention"]
    backends = {"errs_on_node_1": proof_child.BROKEN["errs_on_node_1"]} | attention.backends
    with (
        patch.object(parity, "committed", lambda: ()),
        patch.object(prove, "CHILD", (sys.executable, proof_child.__file__)),
        patch.object(prove, "Child", child),
        patch.dict(OPS, {"attention": replace(attention, backends=backends)}),
    ):
        found = {"first": prepared(), "restarted": prepared()}
    kernels = {name: Backend(attention_sdpa, "of a table", portable=False) for name in SECONDS}
    offered = kernels | {"reference": attention.backends["reference"]}

    def seconds(kind: object, spec: object, device: object, layout: object, way: Way) -> float:
        return SECONDS[way.choices["attention"].name][os.environ["NODE_NAME"]]

    with (
        patch.dict(OPS, {"attention": replace(attention, backends=offered)}),
        patch.object(trial, "_seconds", seconds),
    ):
        records = [Comparison("attention", name, "fp32").failed("", CPU) for name in kernels]
        parity.learn(replace(record, passed=True, problem=None) for record in records)
        way = Way(precision.resolve(spec.precision, None), agreement.backends(spec, world, None), compiles=False)
        taken, tried = trial.fastest(spec, world, Layout(world=3), way)
        found["trial"] = {"taken": taken.choices["attention"].name, "rows": [vars(row) for row in tried.rows]}
    world.barrier()
    file.with_suffix(f".{world.rank}.out").write_text(json.dumps(found))

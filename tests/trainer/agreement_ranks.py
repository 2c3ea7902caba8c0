"""One of two ranks with simulated, different machines: what each would choose alone, and what both choose together."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import micro
import torch

from trainer import agreement, compiled, distributed, ops, precision, prepare
from trainer.arithmetic.memory import choose_layout, training_memory
from trainer.distributed import World
from trainer.specbase import SpecError

WEAK = 1
CAPABILITY = {False: (8, 0), True: (7, 5)}


def chosen_together(spec, world: World) -> dict:
    """The run's dtypes and backends, and the log about them."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("trainer").addHandler(handler)
    try:
        run = prepare.prepare(spec, world, 0.0)
    except SpecError as error:
        return {"error": str(error)}
    finally:
        logging.getLogger("trainer").removeHandler(handler)
    layers = list(run.model.layers)
    run.loader.close()
    return {
        "layout": str(run.mesh.layout),
        "precision": run.precision.name,
        "backends": {op: choice.name for op, choice in run.model.choices.items()},
        "compiled": ["forward" in vars(layer) for layer in layers],
        "log": lines,
    }


def main() -> None:
    file = Path(sys.argv[1])
    logging.getLogger("trainer").setLevel(logging.INFO)
    data, directory = Path(sys.argv[2]), Path(sys.argv[3])
    spec = micro.micro_spec(
        data, directory / "run", parallel={"data": "auto"}, runtime={"preflight": {"enabled": False}}
    )
    gpu_of_rank_0 = torch.device("cpu" if int(os.environ["RANK"]) == WEAK else "cuda", 0)
    with patch.object(distributed, "pick_device", lambda *_: gpu_of_rank_0):
        world = distributed.start(spec.runtime, seed=0)
    weak = world.rank == WEAK
    memory = training_memory(spec.model, spec.optimizer).total * (1.5 if weak else 10)
    ssd = ops.OPS["ssd"]
    no_chunks = replace(ssd.backends["chunked"], unsupported=lambda _: "its chunks do not fit" if weak else None)
    slow = replace(ssd, backends={**ssd.backends, "chunked": no_chunks})
    alone = SimpleNamespace(size=1, rank=0, local_size=1, device=world.device, gather=lambda value: [value])
    with (
        patch.object(agreement, "device_bytes", lambda _: memory),
        patch.object(precision, "device_capability", lambda _: CAPABILITY[weak]),
        patch.dict(ops.OPS, {"ssd": slow}),
        patch.object(compiled, "problem", lambda kind, *_: f"{kind} is wrong" if weak else None),
        patch.object(prepare, "compile_layers", partial(prepare.compile_layers, backend="aot_eager")),
    ):
        found = {
            "device": world.device.type,
            "alone": {
                "layout": str(choose_layout(spec.parallel, spec.model, spec.optimizer, 2, 2, memory)),
                "precision": agreement.rung(spec, alone).name,
                "ssd": agreement.backends(spec, alone, None)["ssd"].name,
            },
            "auto": chosen_together(spec.updated({"runtime": {"compile": "auto"}}), world),
            "bf16": chosen_together(spec.updated({"precision": {"dtype": "bf16"}}), world),
            "chunked": chosen_together(spec.updated({"backends": {"ssd": "chunked"}}), world),
            "compile": chosen_together(spec.updated({"runtime": {"compile": True}}), world),
        }
    with (
        patch.object(agreement, "device_bytes", lambda _: memory),
        patch.object(compiled, "compiler_problem", lambda _: "the compiler fails" if weak else None),
        patch.object(compiled, "problem", lambda *_: world.barrier()),  # where ranks that share experts would block
    ):
        shared = spec.updated({"parallel": {"expert": 2}, "runtime": {"compile": "auto"}})
        found["shared experts"] = chosen_together(shared, world)
    world.barrier()
    file.with_suffix(f".{world.rank}.out").write_text(json.dumps(found))

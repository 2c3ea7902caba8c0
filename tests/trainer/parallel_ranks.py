"""One rank of several training runs in turn in the same processes, since importing PyTorch is most of a test's cost.

`run` starts the ranks. A case is a TrainSpec, and optionally a run from whose first checkpoint it starts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import forked
from ports import free_port

from trainer.spec import TrainSpec
from trainer.specbase import parse


@dataclass
class Case:
    """What to train, and the run that it continues from its first checkpoint."""

    spec: TrainSpec
    begin: Path | None = None


def run(specs: list[TrainSpec], ranks: int, directory: Path, timeout: float = 900) -> list[list[dict[str, Any]]]:
    """Train all specs in order on `ranks` processes; returns what each rank observed for each spec (see `observe`)."""
    return run_cases([Case(spec) for spec in specs], ranks, directory, timeout)


def run_cases(cases: Sequence[Case], ranks: int, directory: Path, timeout: float = 900) -> list[list[dict[str, Any]]]:
    """The same for cases."""
    file = directory / f"cases-{ranks}-{free_port()}.json"
    told = [[free_port(), each.spec.model_dump(mode="json"), each.begin and str(each.begin)] for each in cases]
    file.write_text(json.dumps(told))
    forked.done(forked.run("parallel_ranks", ranks, [file], directory, timeout=timeout))
    by_rank = [json.loads(file.with_suffix(f".{rank}.out").read_text()) for rank in range(ranks)]
    return [[observed[number] for observed in by_rank] for number in range(len(cases))]


def observe(run: Any) -> dict[str, Any]:
    """Number of elements on this rank, and whether its initial weights equal its part of the unsharded model's."""
    import torch

    from trainer.kinds.ngrams import token_classes
    from trainer.model.hybrid import build_model
    from trainer.model.rows import own_rows
    from trainer.optim.shares import local

    spec = run.spec
    classes = token_classes(Path(spec.tokens.tokenizer) / "tokenizer.json")
    whole = dict(build_model(spec.model, spec.backends, seed=spec.seed, token_classes=classes).named_parameters())
    parameters = dict(run.model.named_parameters())
    state = run.optimizers.state_dict()
    same = []
    for name, parameter in parameters.items():
        own, first = own_rows(parameter)
        same.append(torch.equal(own, whole[name][first : first + own.shape[0]]))
    return {
        "same_weights": run.first_step > 0 or all(same),
        "parameters": sum(local(p).numel() for p in parameters.values()),
        "experts": sum(local(p).numel() for p in parameters.values() if p.dim() == 3),
        "small": sum(p.numel() for n, p in parameters.items() if p.dim() < 2 or "router" in n or "conv" in n),
        "state": sum(local(tensor).numel() for tensor in state.values() if tensor.dim()),
        "refuses_broken_weights": refuses_broken_weights(run),
    }


def refuses_broken_weights(run: Any) -> bool:
    """Whether this rank saves no checkpoint while the last rank holds a number that is not finite."""
    import torch

    from trainer.errors import DivergedError
    from trainer.model.rows import own_rows

    name = "embedding.weight" if run.spec.model.tied_embedding else "head.weight"
    own, _ = own_rows(run.model.get_parameter(name).detach())
    before = own.clone()
    if run.world.rank == run.world.size - 1:
        own[-1, -1] = torch.nan
    try:
        run.checkpoints.save(0, {}, {})
    except DivergedError as error:
        return f"model.{name} is not finite" in str(error)
    finally:
        own.copy_(before)
    return False


def main() -> None:
    from trainer import compiled, loop
    from trainer import prepare as preparing
    from trainer.checkpoints import checkpoint
    from trainer.model import hybrid

    hybrid.INIT_BLOCK_ELEMENTS = 300  # so small that ranks cut in the middle of blocks
    file = Path(sys.argv[1])
    observed = []
    prepare = loop.prepare

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("trainer").addHandler(handler)
    logging.getLogger("trainer").setLevel(logging.INFO)

    def observing(*arguments: Any) -> Any:
        said.clear()
        prepared = prepare(*arguments)
        observed.append({**observe(prepared), "mesh": [line for line in said if line.startswith("mesh (")]})
        return prepared

    loop.prepare = observing
    # What the compiler captures does not depend on the backend; this one generates no code, which would take minutes.
    preparing.compile_layers = compiled.compile_layers = partial(preparing.compile_layers, backend="aot_eager")
    for port, value, begin in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = str(port)
        spec = parse(TrainSpec, value)
        if begin and os.environ["RANK"] == "0":  # the others wait for it in the rendezvous
            first = checkpoint.published(begin)[-1]
            shutil.copytree(first, checkpoint.step_dir(spec.run_dir, int(first.name.removeprefix("step-"))))
        assert loop.train(spec) == 0
    file.with_suffix(f".{os.environ['RANK']}.out").write_text(json.dumps(observed))

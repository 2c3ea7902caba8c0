"""One rank of several training runs, one after the other in the same processes: importing PyTorch costs most of a test.

`run` starts the ranks; each of them executes this file. A case is a TrainSpec and what to do after training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import micro
from ports import free_port

from trainer.spec import TrainSpec
from trainer.specbase import parse


def run(specs: list[TrainSpec], ranks: int, directory: Path, timeout: float = 900) -> list[list[dict[str, Any]]]:
    """Train all specs, in order, on `ranks` processes. For each spec what each rank has observed (see `observe`)."""
    file = directory / f"cases-{ranks}-{free_port()}.json"
    ports = [free_port() for _ in specs]
    file.write_text(json.dumps([[port, spec.model_dump(mode="json")] for port, spec in zip(ports, specs, strict=True)]))
    processes = []
    for rank in range(ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = micro.environment(MASTER_ADDR="127.0.0.1", **{k: str(v) for k, v in variables.items()})
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        log = file.with_suffix(f".{rank}.log").open("w")
        command = [sys.executable, __file__, str(file)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=timeout) for process in processes]
    logs = [file.with_suffix(f".{rank}.log").read_text() for rank in range(ranks)]
    assert not any(codes), "\n".join(logs)[-8000:]
    by_rank = [json.loads(file.with_suffix(f".{rank}.out").read_text()) for rank in range(ranks)]
    return [[observed[number] for observed in by_rank] for number in range(len(specs))]


def observe(run: Any) -> dict[str, Any]:
    """Elements that this rank keeps, and whether its initial weights are a part of those of a model built whole."""
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
    """Whether this rank saves no checkpoint while a number that the last rank holds is none."""
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
    from trainer.model import hybrid

    hybrid.INIT_BLOCK_ELEMENTS = 300  # so small that ranks cut in the middle of blocks
    file = Path(sys.argv[1])
    observed = []
    prepare = loop.prepare

    def observing(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        observed.append(observe(prepared))
        return prepared

    loop.prepare = observing
    # What the compiler captures does not depend on the backend; this one makes no code, which would take minutes.
    preparing.compile_layers = compiled.compile_layers = partial(preparing.compile_layers, backend="aot_eager")
    for port, spec in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = str(port)
        assert loop.train(parse(TrainSpec, spec)) == 0
    file.with_suffix(f".{os.environ['RANK']}.out").write_text(json.dumps(observed))


if __name__ == "__main__":
    main()
    micro.end_rank()

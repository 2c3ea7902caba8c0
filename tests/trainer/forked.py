"""Ranks as forks of one process that has imported PyTorch, which is most of the cost of a rank in a small test.

Users' ranks are separate processes, and so are those of tests that start the entrypoint. The only difference of ranks
here is that the imports were made before them.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import micro
from ports import free_port

from trainer.spec import TrainSpec

# What ranks import, at the top of their modules or later.
PRELOAD = (
    *("trainer.__main__", "trainer.loop", "trainer.compiled", "trainer.optim.shares", "trainer.model.rows"),
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"),
)
_servers: list[subprocess.Popen[str]] = []  # none, or the one of this process


def run(
    module: str,
    ranks: int,
    arguments: Sequence[str | Path],
    directory: Path,
    variables: Sequence[dict[str, str]] = (),
    timeout: float = 600,
) -> list[tuple[int, str]]:
    """Call `module.main()` on ranks of one process group, with `arguments` in sys.argv.

    Args:
        directory: where the ranks' outputs are written.
        variables: environment of each rank, in addition to torchrun's.

    Returns:
        Exit code and output of each rank.
    """
    port = free_port()
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [directory / f"{module}-{port}.{rank}.log" for rank in range(ranks)]
    told: list[dict[str, Any]] = []
    for rank, log in enumerate(logs):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank, **(variables[rank] if variables else {})}
        told.append({"log": str(log), "environment": micro.environment(**{k: str(v) for k, v in own.items()})})
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([module, [str(each) for each in arguments], told]) + "\n")
    server.stdin.flush()
    ready, _, _ = select.select([server.stdout], [], [], timeout)
    answer = server.stdout.readline() if ready else ""
    outputs = [log.read_text() if log.exists() else "" for log in logs]
    if not answer:  # with its ranks; the next test gets a new one
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        raise AssertionError(f"no answer from the ranks in {timeout} s:\n" + "\n".join(outputs)[-8000:])
    return list(zip(json.loads(answer), outputs, strict=True))


def done(found: list[tuple[int, str]]) -> list[str]:
    """The outputs of ranks, all of which must have succeeded."""
    assert not any(code for code, _ in found), "\n".join(output for _, output in found)[-8000:]
    return [output for _, output in found]


def train(spec: TrainSpec, ranks: int) -> list[tuple[int, str]]:
    """The program of a rank on a spec, which is written beside the run directory."""
    file = micro.write_spec(spec, Path(spec.run_dir).with_suffix(".yaml"))
    return run("trainer.__main__", ranks, ["train", "--spec", file], file.parent)


def _server() -> subprocess.Popen[str]:
    if not _servers or _servers[0].poll() is not None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), *(each for each in sys.path if each)])
        process = subprocess.Popen(
            [sys.executable, __file__],
            env=micro.environment(PYTHONPATH=path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # to end ranks that hang
        )
        _servers[:] = [process]
        atexit.register(_end, process)
    return _servers[0]


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None and process.stdin is not None:
        process.stdin.close()
        process.wait(timeout=60)


def _rank(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """In a fork; does not return."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream, number in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    try:
        code = importlib.import_module(module).main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    micro.end_rank(int(code or 0))


def serve() -> None:
    """Answer each line of stdin, which names the module, its arguments and the ranks, with a line of exit codes."""
    gc.disable()
    for each in PRELOAD:
        importlib.import_module(each)
    gc.freeze()
    gc.enable()
    while line := sys.stdin.readline():
        module, arguments, told = json.loads(line)
        importlib.import_module(module)
        pids = []
        for each in told:
            if pid := os.fork():
                pids.append(pid)
            else:
                _rank(module, arguments, **each)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    serve()

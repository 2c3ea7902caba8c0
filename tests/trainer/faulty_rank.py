"""The unchanged entrypoint with ranks that fail as FAULT says: `faulty_rank.py [ARGUMENT OF THE ENTRYPOINT]…`.

FAULT is a word and, after a space, its argument: `stall STEP` never gets the data of that step; `hold STEP` gets it,
and later steps, only after the rank has been asked to stop; with `late FILE` the last rank creates a file before it
enters the final barrier; with `die FILE` it is killed there instead.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import micro


def misbehave(fault: str, argument: str) -> None:
    from trainer import loop
    from trainer.data.loader import StepBatch, TokenLoader
    from trainer.process.stopping import StopWish

    if fault == "stall":
        get = TokenLoader.__next__
        left = iter(range(1, int(argument)))

        def stalling(loader: TokenLoader) -> object:
            if next(left, None) is None:
                time.sleep(600)
            return get(loader)

        TokenLoader.__next__ = stalling
    elif fault == "hold":
        get = TokenLoader.__next__
        wishes: list[StopWish] = []

        class Watched(StopWish):
            def __init__(self) -> None:
                super().__init__()
                wishes.append(self)

        def holding(loader: TokenLoader) -> StepBatch:
            batch = get(loader)
            step = sum(batch.tokens_by_source.values()) // micro.TOKENS_PER_STEP
            while step >= int(argument) and not wishes[0].code():
                time.sleep(0.01)
            return batch

        loop.StopWish = Watched
        TokenLoader.__next__ = holding
    elif os.environ["RANK"] != "0":
        finish = loop.finish

        def finish_badly(run: loop.Run, *others: object) -> int:
            barrier = run.world.barrier

            def late() -> None:
                time.sleep(4)
                Path(argument).touch()
                if fault == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                barrier()

            object.__setattr__(run.world, "barrier", late)
            return finish(run, *others)

        loop.finish = finish_badly


if __name__ == "__main__":
    if "RANK" in os.environ:
        from trainer.__main__ import main

        misbehave(*os.environ["FAULT"].split(maxsplit=1))
        micro.end_rank(main())
    from trainer import entrypoint

    entrypoint.RANK_PROGRAM = (__file__,)
    sys.exit(entrypoint.main())

"""Stands in for Megatron-LM's program: no model, but its arguments, its lines, its signal and its checkpoint files.

Prints as core 0.12 does: steps on the last rank, finished checkpoints on the first. A checkpoint is a copy of the
weights that it was told to begin with. With FAULT=slow a step takes a second.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist


def values(name: str) -> list[str]:
    start = sys.argv.index(name) + 1
    found = []
    for text in sys.argv[start:]:
        if text.startswith("--"):
            break
        found.append(text)
    return found


stopped = False


def stop(*_: object) -> None:
    global stopped
    stopped = True


def save(step: int) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        folder = Path(values("--save")[0])
        shutil.copytree(Path(values("--pretrained-checkpoint")[0]) / "release", folder / f"iter_{step:07d}")
        (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
        print(f"  successfully saved checkpoint from iteration {step:7d} to {folder} [ t 1/1, p 1/1 ]", flush=True)
    dist.barrier()


def main() -> None:
    assert dist.is_initialized(), "Megatron uses the group that is there"
    signal.signal(signal.SIGTERM, stop)
    last = dist.get_rank() == dist.get_world_size() - 1
    slow = os.environ.get("FAULT") == "slow"
    steps, rows, every = (int(values(name)[0]) for name in ("--train-iters", "--global-batch-size", "--save-interval"))
    blend = json.loads(Path(values("--per-split-data-args-path")[0]).read_text())["train"]
    assert all(Path(f"{prefix}.idx").exists() for prefix in blend[1::2]), blend
    tracker = Path(values("--load")[0]) / "latest_checkpointed_iteration.txt"
    first = int(tracker.read_text()) if tracker.exists() else 0
    print("training ...", flush=True)
    for step in range(first + 1, steps + 1):
        time.sleep(1.0 if slow else 0.05)
        if last:
            print(
                f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {step:8d}/{steps:8d} | consumed samples: "
                f"{step * rows:12d} | elapsed time per iteration (ms): {50.0:.1f} | throughput per GPU (TFLOP/s/GPU): "
                f"{0.1:.1f} | learning rate: {3e-4:.6E} | global batch size: {rows:5d} | lm loss: "
                f"{6 - 0.1 * step:.6E} | load_balancing_loss: {1.02:.6E} | loss scale: 1.0 | grad norm: {1.5:.3f} | "
                f"number of skipped iterations: {0:3d} | number of nan iterations: {0:3d} |",
                flush=True,
            )
        seen = torch.tensor([stopped])
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        if seen.item():
            save(step)
            sys.exit(0)
        if step % every == 0:
            save(step)
    if steps % every:
        save(steps)


if __name__ == "__main__":
    main()

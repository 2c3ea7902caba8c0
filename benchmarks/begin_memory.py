"""Peak host memory of ranks that start from a transformers folder, compared with loading it by transformers.

    python benchmarks/begin_memory.py [--preset dual-h100-dense] [--ranks 2] [--files 4]

Writes the preset's model with random BF16 weights in `--files` files, then starts the ranks on CPUs, with the model
sharded by FSDP. Prints for each rank: the size of its weights (FP32), its peak resident memory relative to that before
the model was built (/proc/self/status, VmHWM), and the ratio to the promised limit: its own share plus one file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from manifests.spec import load_job
from trainer import ops
from trainer.hf.architectures import native
from trainer.hf.weights import INDEX, tensors
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.spec import TrainSpec

MIB = 2**20


def write(spec: ModelSpec, folder: Path, files: int) -> int:
    """Write the model as `files` files of about equal size; returns the bytes of the largest."""
    architecture, why = native(spec)
    assert architecture is not None, why
    shapes = build_model(spec, device="meta", seed=None).state_dict()
    named = [(name, value.shape) for name, value in tensors(architecture, spec, shapes, torch.bfloat16)]
    most = -(-sum(shape.numel() for _, shape in named) // files)
    where: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    sizes = []
    for number, (name, shape) in enumerate(named, start=1):
        part[name] = torch.randn(shape, dtype=torch.bfloat16) * 0.02
        where[name] = f"model-{len(sizes) + 1:05}.safetensors"
        if sum(value.numel() for value in part.values()) >= most or number == len(named):
            save_file(part, folder / where[name], {"format": "pt"})
            sizes.append(sum(value.nbytes for value in part.values()))
            part = {}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(architecture.config(spec, 2048) | {"dtype": "bfloat16"}))
    print(f"{sum(sizes) / 2**30:.2f} GiB in {len(sizes)} files, the largest {max(sizes) / MIB:.0f} MiB", flush=True)
    return max(sizes)


def peak() -> int:
    """Peak resident memory of this process since the last `reset`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset() -> int:
    """Reset the peak; returns the current resident memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def rank(spec: TrainSpec) -> None:
    from trainer import distributed
    from trainer.begin import begin_with
    from trainer.model.rows import own_rows
    from trainer.parallel.layout import Layout
    from trainer.parallel.mesh import Mesh

    world = distributed.start(spec.runtime, spec.seed)
    mesh = Mesh(Layout(world.size, "fsdp", shard=world.size), world.device)
    choices = ops.resolve(spec.backends, world.device, torch.float32, spec.model)
    world.barrier()
    before = reset()
    model = build_model(spec.model, device=world.device, seed=0, share=partial(mesh.share, dtype=None), choices=choices)
    began = time.monotonic()
    begin_with(spec, model, world)
    seconds = time.monotonic() - began
    share = sum(own_rows(p.detach())[0].nbytes for p in model.parameters())
    found = world.gather((share, peak() - before, seconds))
    if world.is_main:
        print(json.dumps(found), flush=True)
    distributed.stop()


def peer(folder: str) -> None:
    from transformers import AutoModelForCausalLM

    before, began = reset(), time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    share = sum(p.nbytes for p in model.parameters())
    print(json.dumps([[share, peak() - before, time.monotonic() - began]]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dual-h100-dense")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--of", choices=["rank", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    runtime = {"device": "cpu", "preflight": {"enabled": False}}
    spec = load_job(chosen.preset, {"train": {"runtime": runtime}}).train_spec()
    if chosen.of == "peer":
        return peer(chosen.folder)
    if chosen.of == "rank":
        return rank(spec.updated({"init_from": chosen.folder}))
    with tempfile.TemporaryDirectory() as folder:
        largest = write(spec.model, Path(folder), chosen.files)
        for what, count in (("rank", chosen.ranks), ("peer", 1)):
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871", "WORLD_SIZE": str(count)}
            command = [sys.executable, __file__, "--preset", chosen.preset, "--of", what, "--folder", folder]
            started = [
                subprocess.Popen(
                    command,
                    env=os.environ | variables | {"RANK": str(n), "LOCAL_RANK": str(n), "LOCAL_WORLD_SIZE": str(count)},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for n in range(count)
            ]
            output = started[0].communicate()[0]
            assert not any(process.wait() for process in started)
            for number, (share, most, seconds) in enumerate(json.loads(output.splitlines()[-1])):
                name = f"rank {number}" if what == "rank" else "transformers, alone"
                told = f"holds {share / MIB:,.0f} MiB, peak {most / MIB:,.0f} MiB"
                print(
                    f"{name}: {told}, {most / (share + largest):.2f} of that and one file, {seconds:.1f} s", flush=True
                )


if __name__ == "__main__":
    main()

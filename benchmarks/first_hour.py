"""Everything that a new GPU is to show, in one command: each part's output and figures under benchmarks/results/.

    python benchmarks/first_hour.py [--only proof,step] [--seconds 580] [--out benchmarks/results] [--preset PRESET]

Parts run in this order, each in a process of its own:

    proof     yaongi doctor: every kernel against its reference; the other parts take what has passed
    step      a step of the presets in BF16 as it is, compiled, as CUDA graphs, and in FP8, as on a GPU of 80 GB:
              tokens/s, MFU, memory, time beside the roofline, the 15 dearest kernels
    experts   backends of the experts side by side; casts and sums of their weights
    optimizer Muon against torch's, and symmetric products
    curves    200 steps of `small` in BF16, in FP8 and in FP32 on the CPU

What has a result already is passed over, so a second call goes on where the time of the first one ended. A part writes
NAME.txt, what it printed, and last NAME.run.json: command, exit status, seconds, device and versions.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.files import atomic_write
from trainer.parity import package_version

HERE = Path(__file__).parent
GOALS = {"h100-4b-interleaved": 90_000, "h100-4b": 60_000}  # tokens/s on an H200
FLOOR = 45_000  # for either
EIGHTY_GB = 78 / 141  # of an H200
PACKAGES = ("torch", "triton", "transformer_engine", "mamba_ssm", "causal_conv1d", "flash_attn", "quack-kernels")


class Part(NamedTuple):
    group: str
    name: str
    command: list[str]


def parts(presets: list[str], out: Path) -> Iterator[Part]:
    python = sys.executable
    yield Part("proof", "proof", [python, "-c", "from pipelines.cli import main; main()", "doctor"])
    for preset in presets:
        for name, options in (
            ("bf16", []),
            ("bf16-compiled", ["--compile"]),
            ("bf16-graphs", ["--compile", "--graphs"]),
            ("fp8-compiled", ["--compile", "--precision", "fp8:current"]),
        ):
            result = ["--out", str(out / f"step-{preset}-{name}.json")]
            shape = ["--preset", preset, "--tokens", "16384", "--recompute", "selective"]
            if torch.cuda.is_available():
                shape += ["--memory-fraction", f"{EIGHTY_GB:.3f}"]
            else:
                shape[3] = "256"
            command = [python, str(HERE / "train_step.py"), *shape, *options, *result]
            yield Part("step", f"step-{preset}-{name}", command)
    small = [] if torch.cuda.is_available() else ["--tokens", "64", "--divide", "16"]
    yield Part("experts", "experts", [python, str(HERE / "experts.py"), *small])
    yield Part("experts", "experts_step", [python, str(HERE / "experts_step.py")])
    yield Part("optimizer", "optimizer", [python, str(HERE / "optimizer.py"), "--symmetric"])
    curves = ["--steps", "200", "--model", "small", "--gpu", "--tokens-per-step", "4096"]
    yield Part("curves", "curves", [python, str(HERE / "fp8_curves.py"), *curves])


def run(part: Part, out: Path, seconds: float) -> int:
    """The exit status; 124 where its time was over, and then it has no result."""
    began = time.monotonic()
    with (out / f"{part.name}.txt").open("wb") as printed:
        try:
            done = subprocess.run(part.command, stdout=printed, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return 124
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {
        "command": " ".join(["python", *part.command[1:]]).replace(f"{HERE}/", "benchmarks/"),
        "status": done.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "device": device,
        "versions": {name: package_version(name) for name in PACKAGES},
    }
    atomic_write(out / f"{part.name}.run.json", json.dumps(about, indent=1).encode())
    return done.returncode


def goals(out: Path) -> Iterator[str]:
    """Measured speeds beside what is wanted."""
    for file in sorted(out.glob("step-*.json")):
        if file.name.endswith(".run.json"):
            continue
        report = json.loads(file.read_bytes())
        goal = GOALS.get(report["preset"])
        for result in report["results"]:
            if result["tokens_per_second"]:
                wanted = f", {goal:,} wanted and {FLOOR:,} the least" if goal else ""
                yield f"{file.stem}: {result['tokens_per_second']:,.0f} tokens/s{wanted}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some groups of parts, with commas")
    parser.add_argument("--seconds", type=float, default=580, help="of the whole call")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--preset", help="of the steps, instead of both for an H100")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    until, failed = time.monotonic() + arguments.seconds, 0
    for part in parts([arguments.preset] if arguments.preset else list(GOALS), arguments.out):
        if arguments.only and part.group not in arguments.only.split(","):
            continue
        if (arguments.out / f"{part.name}.run.json").exists():
            print(f"{part.name}: has a result")
            continue
        left = until - time.monotonic()
        status = run(part, arguments.out, left) if left > 0 else 124
        said = "its time is over; call again" if status == 124 else f"exit status {status}"
        print(f"{part.name}: {said}", flush=True)
        failed += status not in (0, 124)
    print("\n".join(goals(arguments.out)))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

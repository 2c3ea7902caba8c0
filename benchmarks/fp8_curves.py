"""Train `tiny` in BF16 and in emulated FP8 with each recipe on the sample corpus, and compare the losses.

    python benchmarks/fp8_curves.py [--steps 40] [--model tiny] [--gpu] [--work DIR]

With `--gpu`: BF16 and the proven FP8 of this GPU, and FP32 on the CPU. All runs have the same initial weights and
tokens. Prints the mean loss of each tenth of the run, and the final difference from BF16. No first or last layers are
kept in BF16, so that as much as possible runs in FP8.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch.distributed as dist

from components.download import step as download
from components.shards import step as shards
from components.tokenizer import step as tokenizer
from manifests.spec import JobSpec, load_job
from trainer.loop import train

RUNS = {"bf16": {"dtype": "bf16"}} | {
    recipe: {"dtype": "fp8", "fp8": {"recipe": recipe, "implementation": "emulated", "bf16_end_layers": 0}}
    for recipe in ("delayed", "current", "block128")
}
GPU_RUNS = {
    "bf16": {"dtype": "bf16"},
    "fp8": {"dtype": "fp8", "fp8": {"bf16_end_layers": 0}},
    "cpu fp32": {"dtype": "fp32"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--model", default="tiny", help="the preset whose model is trained, on the data of tiny")
    parser.add_argument("--gpu", action="store_true", help="real FP8 on this GPU instead of emulated on the CPU")
    parser.add_argument("--work", type=Path, help="directory for data and runs; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        compare(arguments.work or Path(temporary), arguments)


def compare(work: Path, arguments: argparse.Namespace) -> None:
    losses, steps = {}, arguments.steps
    for name, precision in (GPU_RUNS if arguments.gpu else RUNS).items():
        device = "cuda" if arguments.gpu and not name.startswith("cpu") else "cpu"
        losses[name] = losses_of(work, name, precision, device, arguments)
    part = max(1, steps // 10)
    means = {name: [sum(run[i : i + part]) / part for i in range(0, steps, part)] for name, run in losses.items()}
    print("steps     " + "  ".join(f"{name:>8}" for name in means))
    for index in range(len(means["bf16"])):
        print(
            f"{index * part + 1:4d}-{(index + 1) * part:<4d} "
            + "  ".join(f"{run[index]:8.4f}" for run in means.values())
        )
    for name, run in means.items():
        print(f"{name:9} ends {run[-1] - means['bf16'][-1]:+.4f} nats from bf16")


def losses_of(work: Path, name: str, precision: dict, device: str, arguments: argparse.Namespace) -> list[float]:
    steps, model = arguments.steps, load_job(arguments.model).train.model
    job: JobSpec = load_job("tiny").updated(
        {
            "storage": {"datasets_dir": str(work / "data"), "checkpoints_dir": str(work / name.replace(" ", "-"))},
            "train": {
                "steps": steps,
                "model": model.model_dump(mode="json", exclude_unset=True),
                "batch": {"tokens_per_step": arguments.tokens_per_step, "micro_batch_rows": 2},
                "precision": precision,
                "checkpoint": {"every_steps": steps},
                "runtime": {"metrics_port": 0, "device": device},
            },
        }
    )
    raw = download.run(job)
    vocabulary = tokenizer.run(job, raw)
    shards.run(job, raw, vocabulary)
    spec = job.train_spec()
    train(spec)
    if dist.is_initialized():
        dist.destroy_process_group()
    lines = (Path(spec.run_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    main()

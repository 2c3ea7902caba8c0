"""What a preset learns in a few hundred steps with AdamW, Muon and TEON on the same data with the same seeds.

    python benchmarks/learning.py [--seeds 2]           tiny: table and plot in docs/learning.md and .png
    python benchmarks/learning.py --sweep               tiny: the best learning rates of AdamW and Muon
    python benchmarks/learning.py --sweep --preset small --steps 1000 --tokens-per-step 32768      on a GPU

Each run is a full run of `python -m trainer` on the sample corpus; finished runs in --directory are reused. The
baseline is the entropy of single tokens: the loss of a model that has learnt only their frequencies. A loss is the mean
of the last ten steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from components.download import step as download
from components.hygiene import step as hygiene
from components.shards import step as shards
from components.tokenizer import step as tokenizer
from manifests.spec import JobSpec, load_job
from trainer.data.documents import SourceDocuments
from trainer.data.manifest import read_manifest
from trainer.spec import TrainSpec
from trainer.specbase import to_yaml

DOCS = Path(__file__).parent.parent / "docs"
# Peak learning rates, each the best of the sweep in docs/decisions.md. In a Muon run, AdamW's part has the same rate.
RATES = {"AdamW": 2e-3, "Muon": 5e-3, "TEON": 5e-3}
SWEEP = {"AdamW": (2e-3, 5e-3, 1e-2), "Muon": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)}
MARKS = (0.25, 0.5, 0.75, 1.0)  # of the steps
SMOOTHED_STEPS = 10


def optimizer(name: str, rate: float) -> dict[str, Any]:
    """The optimizer section of a spec, with the same peak rate for all parameters."""
    muon = {"learning_rate": rate, "teon_layers": 2 if name == "TEON" else 1}
    return {"name": "adamw" if name == "AdamW" else "muon", "muon": muon, "adamw": {"learning_rate": rate}}


def prepare(preset: str, directory: Path, sources: dict[str, Any] | None = None, **train: Any) -> JobSpec:
    """The preset's job, with changes of `data.sources` and `train` and its shards written; all is under `directory`."""
    storage = {"datasets_dir": str(directory / "datasets"), "checkpoints_dir": str(directory)}
    cluster = {"nodes": 1, "gpus_per_node": 0}
    job = load_job(preset, {"storage": storage, "data": {"sources": sources or {}}, "train": train, "cluster": cluster})
    raw = hygiene.run(job, download.run(job))
    shards.run(job, raw, tokenizer.run(job, raw))
    return job


def unigram_entropy(spec: TrainSpec) -> float:
    """Entropy of single tokens of the mix, in nats per token."""
    directory = Path(spec.tokens.shards)
    manifest = read_manifest(directory, "shards")
    share = np.zeros(spec.model.vocab_size)
    for source, mix in spec.tokens.mix.items():
        documents = SourceDocuments(directory, manifest, source, "train")
        counts = sum(
            np.bincount(documents.tokens(number), minlength=len(share)) for number in range(len(documents.lengths))
        )
        share += mix.weight * counts / counts.sum()
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def run(job: JobSpec, name: str, rate: float, seed: int) -> list[float]:
    """Train, unless done before; returns the loss of each step, nan after a divergence."""
    spec = job.train_spec()
    state = spec.optimizer.state_dtype
    label = f"{job.name}-{name}-{rate:g}-{state}-seed{seed}-{spec.steps}x{spec.batch.tokens_per_step}"
    run_dir = Path(job.storage.checkpoints_dir) / "runs" / label
    spec = spec.updated(
        {
            "run": label,
            "run_dir": str(run_dir),
            "seed": seed,
            "tokens": {"seed": seed},
            "optimizer": optimizer(name, rate),
            "checkpoint": {"every_steps": spec.steps, "asynchronous": False},
            "runtime": {"metrics_port": 0, "log_every_steps": spec.steps},
        }
    )
    file = run_dir.parent / f"{label}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(spec), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "trainer", "--spec", str(file)], capture_output=True, text=True)
    if done.returncode not in (0, 70):  # 70: diverged, which is a valid result of a sweep
        raise SystemExit(f"{label} ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = (run_dir / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [math.nan if (loss := json.loads(line)["loss"]) is None else loss for line in lines]
    print(f"{label}: {smoothed(losses, len(losses)):.3f}", flush=True)
    return losses + [math.nan] * (spec.steps - len(losses))


def smoothed(losses: list[float], step: int) -> float:
    return statistics.fmean(losses[max(0, step - SMOOTHED_STEPS) : step])


def learn(job: JobSpec, seeds: int, parallel: int) -> dict[str, list[list[float]]]:
    """Plot the losses by optimizer, one curve per seed."""
    wanted = [(name, rate, seed) for seed in range(seeds) for name, rate in RATES.items()]
    with ThreadPoolExecutor(parallel) as pool:
        curves = list(pool.map(lambda one: run(job, *one), wanted))
    return {name: [c for (n, _, _), c in zip(wanted, curves, strict=True) if n == name] for name in RATES}


def table(curves: dict[str, list[list[float]]], entropy: float) -> str:
    """Markdown: mean over seeds ± half their range, and how far the final loss is below the entropy of tokens."""
    steps = len(next(iter(curves.values()))[0])
    marks = [round(mark * steps) for mark in MARKS]
    lines = [
        "| optimizer | peak rate | " + " | ".join(f"step {mark}" for mark in marks) + " | below entropy |",
        "|" + "---|" * (len(marks) + 3),
    ]
    for name, runs in curves.items():
        cells = []
        for mark in marks:
            values = [smoothed(losses, mark) for losses in runs]
            cells.append(f"{statistics.fmean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}")
        margin = entropy - statistics.fmean(smoothed(losses, steps) for losses in runs)
        lines.append(f"| {name} | {RATES[name]:g} | " + " | ".join(cells) + f" | {margin:.3f} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[list[float]]], entropy: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, runs) in enumerate(curves.items()):
        for seed, losses in enumerate(runs):
            mean = [smoothed(losses, step) for step in range(1, len(losses) + 1)]
            axes.plot(range(1, len(mean) + 1), mean, f"C{number}", lw=1.2, alpha=0.8, label=None if seed else name)
    axes.axhline(entropy, color="grey", ls="--", lw=1, label="entropy of single tokens")
    axes.set(xlabel="step", ylabel=f"cross-entropy (nats, mean of {SMOOTHED_STEPS} steps)")
    axes.legend()
    figure.savefig(file, dpi=110)


def sweep(job: JobSpec, rates: Iterable[float] | None, parallel: int) -> str:
    """Markdown: the final loss for each rate."""
    wanted = [(name, rate) for name, defaults in SWEEP.items() for rate in rates or defaults]
    with ThreadPoolExecutor(parallel) as pool:
        last = list(pool.map(lambda one: smoothed(run(job, *one, seed=0), job.train.steps), wanted))
    lines = ["| optimizer | peak rate | loss |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {n} | {rate:g} | {loss:.3f} |" for (n, rate), loss in zip(wanted, last, strict=True))]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens-per-step", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rates", type=float, nargs="+", help="of the sweep")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--directory", type=Path, default=Path("work/learning"))
    parser.add_argument("--write", type=Path, help="folder of learning.md and .png; docs/ for tiny, else --directory")
    arguments = parser.parse_args()

    batch = {"tokens_per_step": arguments.tokens_per_step, "micro_batch_rows": arguments.rows}
    job = prepare(arguments.preset, arguments.directory.absolute(), steps=arguments.steps, batch=batch)
    entropy = unigram_entropy(job.train_spec())
    said = (
        f"`{arguments.preset}`, {arguments.steps} steps of {arguments.tokens_per_step} tokens of the sample corpus; "
        f"entropy of single tokens: {entropy:.3f} nats."
    )
    if arguments.sweep:
        print("", said, "", sweep(job, arguments.rates, arguments.parallel), sep="\n")
        return
    curves = learn(job, arguments.seeds, arguments.parallel)
    text = table(curves, entropy)
    print("", said, "", text, sep="\n")
    to = arguments.write or (DOCS if arguments.preset == "tiny" else arguments.directory)
    plot(curves, entropy, to / "learning.png")
    size = f"--steps {arguments.steps} --tokens-per-step {arguments.tokens_per_step} --seeds {arguments.seeds}"
    command = f"python benchmarks/learning.py --preset {arguments.preset} {size}"
    (to / "learning.md").write_text(PAGE.format(said=said, table=text, seeds=arguments.seeds, command=command), "utf-8")


PAGE = """# What the optimizers learn

{said} Cross-entropy in nats, mean of ten steps, over {seeds} seeds ± half their range.

{table}

![loss by step](learning.png)

Each optimizer has the learning rate that was best for it in the sweep of [decisions.md](decisions.md). Muon and TEON
train embedding, head, norms and Engram tables by AdamW at the same rate. TEON joins the query, key and value matrices
of pairs of attention layers; `tiny` has one such pair.

Made by `{command}`.
"""

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""What each part of the default recipe gives: a preset with one thing changed, by several seeds, on held-out text.

    python benchmarks/ablations.py --seeds 3 --parallel 2       tiny: the table and plot in docs/ablations.md and .png
    python benchmarks/ablations.py --only default adamw teon    some of the rows
    python benchmarks/ablations.py --epochs 1 --only order-length     orders of the documents, which need whole epochs
    python benchmarks/ablations.py --preset small --steps 1000 --tokens-per-step 32768       on a GPU

Each run is a full run of `python -m trainer` on the sample corpus; finished runs in --directory are reused. Every row
has its own best rate: first each of RATES times the preset's rates is tried with seed 0, then all seeds run at the
best. The order of the data and the initial weights follow from the seed, so rows are compared pairwise by seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from manifests.spec import JobSpec, load_job
from trainer.arithmetic.flops import flops_per_token
from trainer.data.manifest import read_manifest
from trainer.modelspec import ModelSpec
from trainer.parameters import parameters
from trainer.spec import TrainSpec
from trainer.specbase import to_yaml

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
RATES = (0.25, 0.5, 1.0)  # times the preset's
BASE = "default"
COMPRESSION = {"by": "compression"}
FIGURE = "bits_per_byte"


@dataclass(frozen=True)
class Row:
    """A line of the table: what is changed in the preset's TrainSpec."""

    title: str
    changes: dict[str, Any]


def rows(spec: TrainSpec) -> dict[str, Row]:
    """All rows by the name that --only takes."""
    model = spec.model
    layers = list(model.layers)
    mlp = {"width": model.moe.top_k * model.moe.expert_width, "activation": "relu2"}
    plain = [layer.replace("E", "-") for layer in layers]
    return {
        BASE: Row("the preset: Mamba-2, experts, attention, Engram; Muon; documents masked", {}),
        "dense": Row("a dense decoder (attention, SwiGLU, RoPE) of equal operations", {"model": dense(spec)}),
        "no-experts": Row(
            "an MLP as wide as the chosen experts instead of each MoE",
            {"model": {"layers": plain, "mlp": mlp, "moe": None}},
        ),
        "no-engram": Row(
            "without Engram", {"model": {"layers": [layer for layer in layers if layer != "N"], "engram": []}}
        ),
        "no-mask": Row("documents of a row see those before them", {"tokens": {"document_mask": False}}),
        "best-fit": Row("rows that cut few documents (`packing: best_fit`)", {"tokens": {"packing": "best_fit"}}),
        "order-length": Row("the short documents of each source first", ordered(spec, {"by": "length"})),
        "order-compression": Row("the repetitive documents of each source first", ordered(spec, COMPRESSION)),
        "order-long-first": Row(
            "the long documents of each source first", ordered(spec, {"by": "length", "ascending": False})
        ),
        "length-curriculum": Row("rows of a quarter for the first half", short_rows_first(spec)),
        "teon": Row("TEON: pairs of attention layers share a step", {"optimizer": {"muon": {"teon_layers": 2}}}),
        "adamw": Row("AdamW for all parameters", {"optimizer": {"name": "adamw"}}),
        "no-clip": Row("no clipping of gradients", {"optimizer": {"clip_norm": None}}),
        "warmup": Row("a warm-up of 10% instead of 1%", {"schedule": {"warmup_fraction": 0.1}}),
        "cosine-warmup": Row(
            "a warm-up of 10% in the shape of a cosine",
            {"schedule": {"warmup_fraction": 0.1, "warmup_shape": "cosine"}},
        ),
        "mtp": Row("one module of multi-token prediction", {"model": {"mtp": {"depth": 1, "layer": "*-"}}}),
    }


def ordered(spec: TrainSpec, order: dict[str, Any] | None) -> dict[str, Any]:
    """The same order for every source."""
    return {"tokens": {"mix": {name: {"order": order} for name in spec.tokens.mix}}}


def short_rows_first(spec: TrainSpec) -> dict[str, Any]:
    """A quarter of the row length for half of the tokens; a micro-batch keeps its tokens."""
    seq_len, half = spec.tokens.seq_len, spec.steps // 2 * spec.batch.tokens_per_step
    return {
        "tokens": {"seq_len": seq_len // 4, "curriculum": [{"from_tokens": half, "seq_len": seq_len}]},
        "batch": {"micro_batch_rows": 4 * spec.batch.micro_batch_rows},
    }


def of_whole_epochs(spec: TrainSpec, epochs: float) -> TrainSpec:
    """The spec with as many steps, and shares in proportion to the sources' tokens, as read each source so often."""
    manifest = read_manifest(spec.tokens.shards, "shards")
    tokens = {name: manifest.counts(name, "train").tokens for name in spec.tokens.mix}
    total = sum(tokens.values())
    mix = {name: {"weight": count / total} for name, count in tokens.items()}
    return spec.updated({"steps": int(epochs * total / spec.batch.tokens_per_step), "tokens": {"mix": mix}})


def dense(spec: TrainSpec) -> dict[str, Any]:
    """A decoder of the same width for whose tokens it takes as many operations: MLPs near the usual 8/3 of the width,
    and as many layers as that allows."""
    model = spec.model
    attention = model.attention.model_dump() | {"rope_theta": 10_000.0}
    wanted = flops_per_token(model, spec.tokens.seq_len)

    def changes(num_layers: int, width: int) -> dict[str, Any]:
        mlp = {"width": width, "activation": "swiglu"}
        layers = ["*-"] * num_layers
        return {"layers": layers, "attention": attention, "mlp": mlp, "engram": [], "mamba": None, "moe": None}

    def flops(num_layers: int, width: int) -> float:
        changed = ModelSpec.model_validate(model.model_dump() | changes(num_layers, width))
        return flops_per_token(changed, spec.tokens.seq_len)

    usual, found = 8 * model.hidden / 3, []
    for num_layers in range(1, 2 * len(model.layers)):
        narrow, wide = flops(num_layers, 16), flops(num_layers, 32)  # linear in the width
        width = 16 + 16 * round((wanted - narrow) / (wide - narrow))
        if width > 0:
            found.append((abs(width - usual), num_layers, width))
    return changes(*min(found)[1:])


@cache
def learning() -> Any:
    """The neighbour learning.py, which prepares a preset's data."""
    described = importlib.util.spec_from_file_location("learning", HERE / "learning.py")
    assert described and described.loader
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def changed(spec: TrainSpec, row: Row, factor: float, seed: int, name: str) -> TrainSpec:
    """The spec of one run, whose rates are `factor` times the preset's."""
    spec = spec.updated(row.changes)
    muon, adamw = spec.optimizer.muon, spec.optimizer.adamw
    rate = {
        "muon": {"learning_rate": factor * muon.learning_rate},
        "adamw": {"learning_rate": factor * adamw.learning_rate},
    }
    label = f"{name}-x{factor:g}-seed{seed}-{spec.steps}x{spec.batch.tokens_per_step}"
    return spec.updated(
        {
            "run": label,
            "run_dir": str(Path(spec.run_dir).parent / label),
            "seed": seed,
            "tokens": {"seed": seed},
            "optimizer": rate,
            "checkpoint": {"every_steps": spec.steps, "asynchronous": False},
            "evaluate": {"every_steps": spec.steps, "every_max_tokens": 1_000_000, "prompts": []},
            "runtime": {"metrics_port": 0, "log_every_steps": spec.steps},
        }
    )


def measured(spec: TrainSpec) -> dict[str, float]:
    """Train, unless done before; bits per byte of held-out text by domain, and of all of it; nan after a divergence."""
    result = Path(spec.run_dir) / "validation.jsonl"
    if not result.is_file() or not (Path(spec.run_dir) / "result.json").is_file():
        file = Path(spec.run_dir).parent / f"{spec.run}.yaml"  # the name has a dot of its own
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(spec), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "trainer", "--spec", str(file)], capture_output=True, text=True)
        if done.returncode == 70:  # diverged, a valid result of a rate that is too high
            return {"all": math.nan}
        if done.returncode:
            raise SystemExit(f"{spec.run} ended with {done.returncode}: {done.stderr[-2000:]}")
    domains = json.loads(result.read_text(encoding="utf-8").splitlines()[-1])["domains"]
    whole = sum(each["bytes"] for each in domains.values())
    scores = {name: each[FIGURE] for name, each in domains.items()}
    total = sum(each[FIGURE] * each["bytes"] for each in domains.values()) / whole
    print(f"{spec.run}: {total:.4f}", flush=True)
    return scores | {"all": total}


def measure(
    spec: TrainSpec, names: list[str], seeds: int, parallel: int
) -> dict[str, tuple[float, list[dict[str, float]]]]:
    """For each row the factor of its best rate and the scores of all seeds at it."""
    table = rows(spec)
    with ThreadPoolExecutor(parallel) as pool:

        def run(wanted: list[tuple[str, float, int]]) -> list[dict[str, float]]:
            return list(pool.map(lambda w: measured(changed(spec, table[w[0]], w[1], w[2], w[0])), wanted))

        tried = [(name, factor, 0) for name in names for factor in RATES]
        scores = dict(zip(tried, run(tried), strict=True))
        best = {
            name: min(RATES, key=lambda f, n=name: (math.isnan(scores[n, f, 0]["all"]), scores[n, f, 0]["all"]))
            for name in names
        }
        final = [(name, best[name], seed) for name in names for seed in range(seeds)]
        outcomes = run(final)
    return {
        name: (best[name], [o for (n, _, _), o in zip(final, outcomes, strict=True) if n == name]) for name in names
    }


def sizes(spec: TrainSpec, row: Row) -> tuple[int, float]:
    """Parameters, and operations of a token, forward and backward."""
    model = spec.updated(row.changes).model
    return sum(math.prod(p.shape) for p in parameters(model)), flops_per_token(model, spec.tokens.seq_len)


def as_table(spec: TrainSpec, outcomes: dict[str, tuple[float, list[dict[str, float]]]]) -> str:
    """Markdown. The difference to the first row is a mean over seeds ± half the range of the differences by seed."""
    known = rows(spec)
    base = [scores["all"] for scores in outcomes[BASE][1]]
    domains = [name for name in outcomes[BASE][1][0] if name != "all"]
    lines = [
        f"| | parameters | operations | rate | bits per byte | difference | {' | '.join(domains)} |",
        "|" + "---|" * (6 + len(domains)),
    ]
    _, own_flops = sizes(spec, known[BASE])
    for name, (factor, scores) in outcomes.items():
        params, flops = sizes(spec, known[name])
        values = [each["all"] for each in scores]
        gaps = [value - mine for value, mine in zip(values, base, strict=True)]
        cells = [
            known[name].title,
            f"{params / 1e6:.2f}M",
            f"{flops / own_flops:.2f}",
            f"× {factor:g}",
            f"{statistics.fmean(values):.4f} ± {half_range(values):.4f}",
            "" if name == BASE else f"{statistics.fmean(gaps):+.4f} ± {half_range(gaps):.4f}",
            *(f"{statistics.fmean(each[domain] for each in scores):.3f}" for domain in domains),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def half_range(values: list[float]) -> float:
    return (max(values) - min(values)) / 2


def plot(outcomes: dict[str, tuple[float, list[dict[str, float]]]], file: Path) -> None:
    """Differences to the default by seed, one dot each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = [scores["all"] for scores in outcomes[BASE][1]]
    names = [name for name in outcomes if name != BASE]
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(reversed(names)):
        gaps = [scores["all"] - mine for scores, mine in zip(outcomes[name][1], base, strict=True)]
        axes.plot(gaps, [place] * len(gaps), "o", color="C0", alpha=0.6)
        axes.plot(statistics.fmean(gaps), place, "|", color="C3", ms=16, mew=2)
    axes.axvline(0, color="grey", lw=1)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("bits per byte of held-out text, minus the default's with the same seed (left is better)")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--epochs", type=float, help="of every source, instead of --steps and the preset's shares")
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="rows; the default is always among them")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--directory", type=Path, default=Path("work/ablations"))
    parser.add_argument("--write", type=Path, help="folder of ablations.md and .png; docs/ for tiny, else --directory")
    arguments = parser.parse_args()

    batch = {"tokens_per_step": arguments.tokens_per_step, "micro_batch_rows": arguments.rows}
    # All rows read these shards: an order needs the scores beside them, the others ignore them.
    scored = {name: {"order": COMPRESSION} for name in load_job(arguments.preset).data.sources}
    job: JobSpec = learning().prepare(
        arguments.preset, arguments.directory.absolute(), scored, steps=arguments.steps, batch=batch
    )
    spec = job.train_spec()
    spec = spec.updated(ordered(spec, None))
    if arguments.epochs:
        spec = of_whole_epochs(spec, arguments.epochs)
    names = [name for name in rows(spec) if not arguments.only or name in {BASE, *arguments.only}]
    if not arguments.epochs:  # else an order would choose documents
        names = [name for name in names if not name.startswith("order-")]
    if unknown := sorted(set(arguments.only or ()) - set(rows(spec))):
        parser.error(f"--only {unknown[0]}: rows are {', '.join(rows(spec))}")
    if left_out := sorted(set(arguments.only or ()) - set(names)):
        parser.error(f"--only {left_out[0]} needs --epochs, since a run of less than one would leave out documents")
    outcomes = measure(spec, names, arguments.seeds, arguments.parallel)
    amount = f"--epochs {arguments.epochs:g}" if arguments.epochs else f"--steps {arguments.steps}"
    size = f"{amount} --tokens-per-step {arguments.tokens_per_step} --seeds {arguments.seeds}"
    only = f" --only {' '.join(arguments.only)}" if arguments.only else ""
    said = PAGE.format(
        preset=arguments.preset,
        steps=spec.steps,
        tokens=arguments.tokens_per_step,
        seeds=arguments.seeds,
        table=as_table(spec, outcomes),
        rates=", ".join(f"{factor:g}" for factor in RATES),
        command=f"python benchmarks/ablations.py --preset {arguments.preset} {size}{only}",
    )
    print("", said, sep="\n")
    to = arguments.write or (DOCS if arguments.preset == "tiny" else arguments.directory)
    (to / "ablations.md").write_text(said, encoding="utf-8")
    plot(outcomes, to / "ablations.png")


PAGE = """# Ablations

What each part of the recipe gives: `{preset}` with one thing changed, {steps} steps of {tokens} tokens of the sample
corpus, {seeds} seeds. Bits per byte of held-out text that no run has seen, document by document; less is better. ± is
half the range over seeds, also of the differences, which are taken between runs of the same seed. Operations are those
of a token, as a share of the first row's. Each row has the best of its rates at seed 0, × {rates} of the preset's.

{table}

![differences by seed](ablations.png)

Made by `{command}`.
"""

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""The report of a run: one self-contained HTML file.

It is written after evaluation and after export; parts that do not exist yet are left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainer.evaluation.scores import rows
from trainer.files import atomic_write
from trainer.recording.results import headline_loss, loss_of
from trainer.report.charts import line_chart
from trainer.report.run import Run, read_run
from trainer.report.settings import dates, hyperparameters
from trainer.specbase import to_yaml

REPORT = "report.html"


def write_report(run_dir: str | Path, evaluation: dict[str, Any] | None = None) -> Path:
    """Write run_dir/report.html from what lies in the directory; returns its path.

    Args:
        evaluation: shown instead of the directory's eval.json, by whoever is about to write that.

    Raises:
        SpecError: train.yaml is missing or unusable.
        CheckpointError: a file of the run is damaged.
    """
    path, run = Path(run_dir) / REPORT, read_run(run_dir)
    if evaluation is not None:
        run = replace(run, evaluation=evaluation)
    atomic_write(path, render(run).encode())
    return path


def render(run: Run) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("trainer", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "duration": duration, "compact": compact}
    return environment.get_template("report.html.j2").render(
        run=run,
        facts=facts(run),
        charts=charts(run),
        shares=shares(run),
        benchmarks=rows(run.evaluation or {}),
        hyperparameters=hyperparameters(run.spec),
        dates=dates(run.directory),
        spec_yaml=to_yaml(run.spec),
        widest=max((s["bits_per_byte"] for s in run.evaluation["domains"].values()), default=1)
        if run.evaluation
        else 1,
    )


def facts(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, unit or remark) of the tiles on top."""
    spec, last = run.spec, run.steps[-1] if run.steps else None
    tiles = []
    if last:
        tiles.append(("Steps", f"{last['step']:,}", f"of {spec.steps:,}"))
        tiles.append(("Tokens", compact(last["tokens"]), f"{last['tokens']:,}"))
        loss, loss_steps = headline_loss(run.steps)
        if loss is not None:
            first = run.steps[0]["loss"]
            since = f", from {first:.3f}" if first else ""
            tiles.append(("Loss", f"{loss:.3f}", f"nats/token, {loss_of(loss_steps)}{since}"))
    if run.evaluation:
        overall = run.evaluation["all"]
        tiles.append(("Held-out", f"{overall['bits_per_byte']:.3f}", "bits per byte, all domains"))
    if run.export:
        tiles.append(("Parameters", compact(run.export["parameters"]), f"{run.export['parameters']:,}"))
    if run.result:
        tiles.append(("Speed", compact(run.result["tokens_per_second"]), "tokens/s, mean"))
        tiles.append(
            (
                "Time",
                duration(run.result["seconds"]),
                "1 rank" if run.result["world_size"] == 1 else f"{run.result['world_size']} ranks",
            )
        )
        tiles.append(("Restarts", str(run.result["restarts"]), ""))
    return tiles


def charts(run: Run) -> list[dict[str, str]]:
    """Title, unit and SVG of each chart; the first also in a wide version."""
    if not run.steps:
        return []
    steps = [line["step"] for line in run.steps]
    clipped = [line["step"] for line in run.steps if line["clipped"]]

    def chart(title: str, key: str, unit: str, **options: Any) -> dict[str, str]:
        values = [line[key] for line in run.steps]
        return {"title": title, "unit": unit, "svg": line_chart(steps, values, title=title, name=key, **options)}

    losses = [line["loss"] for line in run.steps]
    made = [
        chart("Training loss", "loss", "nats per token"),
        chart("Learning rate", "learning_rate", "of the matrices", smooth=False),
        chart("Throughput", "tokens_per_second", "tokens per second"),
        chart("Gradient norm", "grad_norm", "before clipping", marks=clipped, mark_label="clipped"),
    ]
    made[0]["wide"] = line_chart(steps, losses, title="Training loss", name="loss-wide", wide=True)
    if run.spec.model.moe:
        made.append(chart("Fullest expert", "expert_load_max_ratio", "load / mean load, worst layer"))
    return made


def shares(run: Run) -> list[dict[str, object]]:
    """Asked and actual share of each source in the tokens trained on."""
    tokens = run.steps[-1]["by_source"] if run.steps else {}
    total = sum(tokens.values()) or 1
    return [
        {
            "name": name,
            "asked": mix.weight,
            "actual": tokens.get(name, 0) / total,
            "tokens": tokens.get(name, 0),
            "source": run.sources.get(name),
        }
        for name, mix in run.spec.tokens.mix.items()
    ]


def count(value: float) -> str:
    return f"{value:,.0f}"


def compact(value: float) -> str:
    """1234567 → 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Two leading units: 3 h 12 min."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"

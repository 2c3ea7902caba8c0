"""A plan as tables, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.budget.plan import Plan
from trainer.arithmetic.describe import describe
from trainer.arithmetic.scaling import (
    CORRECTED,
    FITTED_PARAMETERS,
    FITTED_TOKENS,
    FLOPS_PER_PARAMETER,
    LAWS,
    is_extrapolated,
)
from trainer.errors import SpecError
from trainer.spec import MixSpec

DAY = 24  # hours
BF16_BYTES = 2
DEFAULT_EPOCHS: float = MixSpec.model_fields["max_epochs"].default


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that the tables show, in plain units: tokens, FLOPs, hours, kWh, GiB."""
    loss = plan.loss
    return {
        "found": plan.found,
        "law": CORRECTED.source,
        "parameters": {"active": plan.model.active, "total": plan.model.total},
        "tokens": plan.tokens,
        "effective_tokens": plan.effective_tokens,
        "epochs": plan.epochs,
        "flops": plan.flops,
        "mfu": plan.asked.mfu,
        "loss": {"low": loss.low, "value": loss.value, "high": loss.high},
        "points": [
            {"name": p.name, "parameters": p.params, "tokens": p.tokens, "loss": p.loss, "flops": p.flops}
            for p in plan.points
        ],
        "gpus": _gpu_rows(plan),
        "memory": [{"gpus": count, "layout": layout, "gib": gib} for count, layout, gib in plan.memory],
        "checkpoint_bytes": _checkpoint_bytes(plan),
        "notes": list(notes(plan)),
    }


def _gpu_rows(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": each.gpu.name,
            "gpu_hours": (hours := plan.gpu_hours(each.gpu)),
            "days": hours / plan.asked.num_gpus / DAY,
            "num_gpus": plan.asked.num_gpus,
            "price_per_hour": each.price,
            "cost": None if each.price is None else hours * each.price,
            "kwh": None if each.watts is None else hours * each.watts / 1000,
            "mfu_bound": plan.bounds.get(each.gpu.name),
        }
        for each in plan.gpus
    ]


def show(plan: Plan, console: Console) -> None:
    """Print the plan, the better points, the GPUs, the memory, and what the numbers do not know."""
    model, loss = plan.model, plan.loss
    name = model.job.name if model.job else "a dense model"
    console.print(f"[bold]{name}[/bold]: {plan.found} found" if plan.found != "compute" else f"[bold]{name}[/bold]")
    size = f"{_si(model.active)}" + (f" active of {_si(model.total)}" if model.total != model.active else "")
    rows = [
        ("parameters", size),
        ("tokens", f"{_si(plan.tokens)}, {_short(plan.tokens / model.active)} for each active parameter"),
        ("operations", f"{plan.flops:.2e}, {model.flops_per_token:.2e} a token"),
        ("expected loss", f"{loss.value:.3f} nats a token, {loss.low:.2f} to {loss.high:.2f} by all laws and sizes"),
    ]
    if plan.effective_tokens < 0.999 * plan.tokens:
        rows.insert(2, ("worth", f"{_si(plan.effective_tokens)} fresh tokens, as some are repeated"))
    if stored := _checkpoint_bytes(plan):
        rows.append(("checkpoint", f"{stored / 1e9:,.1f} GB; export in BF16 {BF16_BYTES * model.total / 1e9:,.1f} GB"))
    for label, value in rows:
        console.print(f"  {label:<14} {value}", highlight=False)
    console.print(_points(plan), _gpus(plan))
    if plan.memory:
        console.print(_memory(plan))
    for note in notes(plan):
        console.print(f"- {note}", highlight=False)


def notes(plan: Plan) -> Iterator[str]:
    """What a reader must know of the numbers, one sentence each."""
    model, asked = plan.model, plan.asked
    yield (
        f"Law: {CORRECTED.source}; the range is that of {len(LAWS)} published fits. None was fitted on this model, mix "
        "(Korean, code) or tokenizer."
    )
    if is_extrapolated(model.sizes, plan.tokens):
        sizes, amounts = (" to ".join(_si(end) for end in ends) for ends in (FITTED_PARAMETERS, FITTED_TOKENS))
        yield f"Extrapolated: the law is fitted on {sizes} parameters and {amounts} tokens."
    if model.total != model.active:
        yield (
            "A mixture of experts lies between dense models of its active and of all its parameters; the loss is that "
            "of their geometric mean, a rule of thumb."
        )
    if model.job is None:
        yield f"Nearest preset by active parameters: {plan.nearest_preset}."
    for source, epochs in plan.epochs.items():
        most = model.job.data.sources[source].max_epochs if model.job and source else DEFAULT_EPOCHS
        if epochs > most:
            yield (
                f"{f'data.sources.{source}' if source else 'The data'} would be read {epochs:.1f} times, more than "
                f"{most:g}: add data, lower its weight, or train on fewer tokens."
            )
    if model.job and asked.num_gpus != model.job.cluster.world_size:
        try:
            model.job.train_spec().check_shares(asked.num_gpus)
        except SpecError as error:
            yield f"On {asked.num_gpus} GPUs the job is refused as it is: {error}."
    for each in asked.gpus:
        bound = plan.bounds.get(each.gpu.name)
        if bound is not None and asked.mfu > bound:
            yield (
                f"--mfu {asked.mfu:g} is more than {each.gpu.name} allows for this job, {bound:.0%} (yaongi describe "
                f"JOB --gpu {each.gpu.name})."
            )
    yield (
        f"Hours are operations / (peak in BF16 × MFU {asked.mfu:.0%}); restarts, evaluation and data are not in them. "
        "Energy is that of GPUs at their nominal power."
    )


def _points(plan: Plan) -> Table:
    table = Table(title="Sizes of dense models under the law", title_justify="left")
    for column in ("", "parameters", "tokens", "tokens each", "loss", "operations"):
        table.add_column(column, justify="left" if not column else "right")
    for p in plan.points:
        ratio = _short(p.tokens / p.params)
        table.add_row(p.name, _si(p.params), _si(p.tokens), ratio, f"{p.loss:.3f}", f"{p.flops:.2e}")
    return table


def _gpus(plan: Plan) -> Table:
    number = plan.asked.num_gpus
    table = Table(title=f"On GPUs at MFU {plan.asked.mfu:.0%}", title_justify="left")
    for column in ("", "GPU hours", f"days on {number}", "cost", "kWh", "MFU at most"):
        table.add_column(column, justify="left" if not column else "right")
    for each in _gpu_rows(plan):
        table.add_row(
            each["name"],
            _short(each["gpu_hours"]),
            _short(each["days"]),
            "" if each["cost"] is None else _short(each["cost"]),
            "" if each["kwh"] is None else _short(each["kwh"]),
            "" if each["mfu_bound"] is None else f"{each['mfu_bound']:.0%}",
        )
    return table


def _memory(plan: Plan) -> Table:
    gpu = plan.gpus[0].gpu
    table = Table(title=f"Memory of each {gpu.name} ({gpu.memory_gib} GiB), by layout", title_justify="left")
    for column in ("GPUs", "layout", "GiB", "fits"):
        table.add_column(column, justify="left" if column in ("layout", "fits") else "right")
    for count, layout, gib in plan.memory:
        table.add_row(str(count), layout, f"{gib:,.1f}", "yes" if gib <= gpu.memory_gib else "no")
    return table


def plot(plan: Plan, file: Path) -> None:
    """The loss of all dense sizes for the plan's operations, by each law, with the points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    here, best = plan.points[0], plan.points[1]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    low, high = min(here.params, best.params) / 30, max(here.params, best.params) * 30
    sizes = [low * (high / low) ** (n / 200) for n in range(201)]
    for law in LAWS:
        losses = [law.loss(size, here.flops / FLOPS_PER_PARAMETER / size) for size in sizes]
        axes.plot(
            sizes, losses, label=law.source, lw=1.2 if law is CORRECTED else 0.8, alpha=1 if law is CORRECTED else 0.6
        )
    for number, point in enumerate(plan.points):
        axes.plot(point.params, point.loss, "o", color=f"C{3 + number}", label=point.name)
    axes.set(xscale="log", xlabel="parameters", ylabel="loss (nats per token)", ylim=(None, 1.3 * here.loss))
    axes.set_title(f"{here.flops:.2e} operations")
    axes.legend(fontsize=7)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:  # no such folder; a kind of picture that matplotlib does not know
        raise SpecError(f"--plot {file}: {error}; write --plot loss.png") from None
    finally:
        pyplot.close(figure)


def _checkpoint_bytes(plan: Plan) -> int | None:
    job = plan.model.job
    return None if job is None else describe(job.train.model, job.train.seq_len, job.train.optimizer).checkpoint_bytes


def _si(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.0f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

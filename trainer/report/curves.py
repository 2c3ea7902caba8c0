"""The curves of a run's page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.report.charts import Line, line_chart
from trainer.report.run import Run


def curves(run: Run) -> list[str]:
    """Figures of everything that was recorded for each step; a value that no step has gives none."""
    lines = run.steps
    if not lines:
        return []
    steps = [line["step"] for line in lines]

    def curve(name: str, value: Callable[[dict[str, Any]], float | None], *, smooth: bool = True) -> Line:
        return Line(name, steps, list(map(value, lines)), smooth)

    def recorded(key: str, name: str, *, smooth: bool = True) -> Line:
        return curve(name, lambda line: line.get(key), smooth=smooth)

    objectives = list(dict.fromkeys(name for line in lines for name in line["auxiliary"]))
    ahead = [name for name in objectives if name.startswith("mtp_")]
    clipped = [line["step"] for line in lines if line["clipped"]]
    skipped = [line["step"] for line in lines if line["skipped"]]

    def objective(name: str, called: str) -> Line:
        return curve(called, lambda line: line["auxiliary"].get(name))

    next_tokens = [
        recorded("loss", "next token" if ahead else "loss"),
        *(objective(name, f"{int(name.removeprefix('mtp_')) + 1} tokens ahead") for name in ahead),
    ]
    figures = [
        line_chart("Training loss", "nats per token", next_tokens, wide=True, marks=skipped, mark_label="skipped step"),
        *(
            line_chart(f"{name.replace('_', ' ').capitalize()} loss", "auxiliary objective", [objective(name, "loss")])
            for name in objectives
            if name not in ahead
        ),
        line_chart(
            "Learning rate", "of the matrices", [recorded("learning_rate", "rate", smooth=False)], from_zero=True
        ),
        line_chart(
            "Gradient norm", "before clipping", [recorded("grad_norm", "norm")], marks=clipped, mark_label="clipped"
        ),
        line_chart("Throughput", "tokens per second", [recorded("tokens_per_second", "tokens/s")], from_zero=True),
        line_chart("MFU", "share of the devices' peak", [recorded("mfu", "MFU")], from_zero=True),
        line_chart("Answers", "share of tokens that are labels", [recorded("trained_share", "share")], from_zero=True),
    ]
    if run.spec.model.moe:
        fullest, starved = recorded("expert_load_max_ratio", "fullest"), recorded("expert_starved_ratio", "starved")
        figures.append(line_chart("Fullest expert", "load / mean load, worst layer", [fullest]))
        figures.append(line_chart("Starved experts", "share below a tenth of the mean load", [starved], from_zero=True))

    with_fp8 = [line for line in lines if "fp8" in line]  # every few steps only

    def fp8(name: str, *, smooth: bool = True) -> Line:
        return Line(name, [line["step"] for line in with_fp8], [line["fp8"].get(name) for line in with_fp8], smooth)

    operands = [fp8(name) for name in AMAX]
    figures.append(line_chart("FP8 amax", "largest magnitude cast, logarithmic", operands, log=True))
    overflows = fp8("overflows", smooth=False)
    figures.append(line_chart("FP8 overflows", "clamped tensors so far", [overflows], from_zero=True))
    return [figure for figure in figures if figure]


AMAX = ("input", "weight", "gradient")


def validation_curves(run: Run, key: str = "bits_per_byte") -> list[Line]:
    """A line for each domain over the tokens trained on."""
    domains = dict.fromkeys(name for line in run.validations for name in line["domains"])
    return [
        Line(
            name,
            [line["tokens"] for line in run.validations if name in line["domains"]],
            [line["domains"][name][key] for line in run.validations if name in line["domains"]],
        )
        for name in domains
    ]

"""Whether a model falls for the synthetic part of its data: a warning from the validations of a run.

Models that are trained on the texts of models can lose the tails of real text (model collapse, Shumailov et al. 2024,
Nature 631). It shows as the loss of real held-out text rising while that of synthetic text still falls, and as samples
that repeat themselves. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import SpecError
from trainer.specbase import read_yaml

SYNTHETIC_FROM = 0.5  # share of a source that a model wrote
RISE = 0.01  # of the bits per byte of real text over its best; held-out text is the same each time
VALIDATIONS = 3  # after the best one
NGRAM = 3


def synthetic_sources(run_dir: str | Path) -> frozenset[str]:
    """The sources that the run's job declares as written by a model; none without a job."""
    try:
        sources = read_yaml(Path(run_dir) / "job.yaml").get("data", {}).get("sources", {})
        return frozenset(name for name, source in sources.items() if source.get("synthetic", 0) >= SYNTHETIC_FROM)
    except (SpecError, AttributeError, TypeError):  # no job, or none of ours
        return frozenset()


def collapse(validations: Sequence[Mapping[str, Any]], synthetic: frozenset[str]) -> str | None:
    """A line of advice; None while all is well, or without both kinds of sources.

    Args:
        validations: lines of validation.jsonl in order.
        synthetic: names of the sources written by models.
    """
    known = [(line, *_by_kind(line.get("sources") or {}, synthetic)) for line in validations]
    scored = [(line, real, made) for line, real, made in known if real is not None and made is not None]
    if not scored:
        return None
    best = min(range(len(scored)), key=lambda n: scored[n][1])
    (then, low, made_then), (now, real, made) = scored[best], scored[-1]
    if len(scored) - 1 - best < VALIDATIONS or real < (1 + RISE) * low or made >= made_then:
        return None
    repeats, before = distinct(now.get("samples") or []), distinct(then.get("samples") or [])
    said = f"; distinct {NGRAM}-grams of its samples {before:.0%} → {repeats:.0%}" if before and repeats else ""
    return (
        f"real held-out text has got worse since step {then['step']:,} ({low:.3f} → {real:.3f} bits per byte) while "
        f"synthetic text still gets better ({made_then:.3f} → {made:.3f}){said}: lower the weight of "
        f"{', '.join(sorted(synthetic))}, or go back to that step"
    )


def distinct(samples: Sequence[Mapping[str, str]]) -> float | None:
    """The share of distinct runs of NGRAM words in all texts together; None if they are too short."""
    runs = [
        run
        for sample in samples
        for run in zip(*(sample["text"].split()[first:] for first in range(NGRAM)), strict=False)
    ]
    return len(set(runs)) / len(runs) if runs else None


def _by_kind(
    sources: Mapping[str, Mapping[str, float | None]], synthetic: frozenset[str]
) -> tuple[float | None, float | None]:
    """Bits per byte of the real and of the synthetic sources together."""

    def together(names: list[str]) -> float | None:
        scores = [(sources[name]["bits_per_byte"], sources[name]["bytes"]) for name in names]
        size = sum(count or 0 for _, count in scores)
        if not size or any(score is None for score, _ in scores):  # not finite
            return None
        return sum((score or 0) * (count or 0) for score, count in scores) / size

    return together([n for n in sources if n not in synthetic]), together([n for n in sources if n in synthetic])

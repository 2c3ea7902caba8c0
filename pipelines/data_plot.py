"""The plot of `yaongi data stats`: the share of each source and the lengths of its documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from trainer.data.inspection import SourceTotals


def draw(rows: Sequence[SourceTotals], path: Path) -> None:
    """Write the plot; the file suffix sets the format.

    Raises:
        ValueError: matplotlib cannot write that format.
    """
    colours = colormaps["tab10"](np.arange(len(rows)) % 10)
    figure = Figure(figsize=(11, 1.6 + 0.45 * max(4, len(rows))), layout="constrained")
    shares, lengths = figure.subplots(1, 2, width_ratios=[1, 1.3])
    tokens = np.array([row.train_tokens for row in rows], float)
    names = [f"{row.name} ({row.domain})" for row in rows]
    bars = shares.barh(names, tokens / 1e6, color=colours)
    shares.bar_label(bars, [f"{share:.1%}" for share in tokens / max(1.0, tokens.sum())], padding=3)
    shares.invert_yaxis()
    shares.margins(x=0.18)
    shares.set_xlabel("million training tokens")
    longest = max((int(row.lengths.max(initial=1)) for row in rows), default=1)
    edges = np.geomspace(1, max(2, longest), 50)
    for row, colour in zip(rows, colours, strict=True):
        weight, _ = np.histogram(row.lengths, edges, weights=row.lengths)  # by tokens, as in training
        lengths.stairs(weight / max(1, weight.sum()), edges, color=colour, label=row.name, linewidth=1.6)
    lengths.set_xscale("log")
    lengths.set_xlabel("tokens of a document")
    lengths.set_ylabel("share of the source's tokens")
    lengths.legend(frameon=False, fontsize=9)
    for axes in (shares, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)

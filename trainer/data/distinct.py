"""Distinct n-grams of each source (Li et al. 2016, arXiv:1510.03055): how much it repeats itself. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.documents import SourceDocuments
from trainer.data.manifest import Manifest

ORDERS = (1, 2, 3)
SAMPLE = 2**20  # tokens of each source; of the shortest source if it has fewer, since the shares fall with length
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def distinct(documents: list[NDArray[np.integer]]) -> tuple[float, ...]:
    """For each order n, different n-grams as a share of all n-grams within documents; 0 if there is none."""
    ids = np.concatenate([np.empty(0, np.uint64), *(document.astype(np.uint64) for document in documents)])
    left = np.concatenate(
        [np.empty(0, np.int64), *(np.arange(len(d), 0, -1) for d in documents)]
    )  # to the document's end
    shares = []
    for n in ORDERS:
        grams = np.zeros(max(len(ids) - n + 1, 0), np.uint64)
        for first in range(n):
            grams = (grams + ids[first : first + len(grams)] + np.uint64(1)) * MULTIPLIER
            grams ^= grams >> np.uint64(32)
        inside = grams[left[: len(grams)] >= n]
        shares.append(len(np.unique(inside)) / max(len(inside), 1))
    return tuple(shares)


def distinct_of(directory: str | Path, manifest: Manifest) -> tuple[int, dict[str, tuple[float, ...]]]:
    """The tokens that are compared of each source, from the start of its training split, and `distinct` of each.

    Raises:
        DataError: a shard is missing or truncated.
    """
    present = {name: tokens for name in manifest.sources if (tokens := manifest.counts(name, "train").tokens)}
    size = min([SAMPLE, *present.values()])
    found = {}
    for name in present:
        source, documents, room = SourceDocuments(Path(directory), manifest, name, "train"), [], size
        for number in range(len(source.lengths)):
            if not room:
                break
            documents.append(source.tokens(number, 0, room))
            room -= len(documents[-1])
        found[name] = distinct(documents)
    return size, found

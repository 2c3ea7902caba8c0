"""What a check returns, and how its figures are judged and written."""

from __future__ import annotations

from dataclasses import dataclass

MB, GB, GIB = 1e6, 1e9, 2**30


@dataclass(frozen=True)
class Measured:
    """A check that did not fail: `text` for the summary ("" when there is nothing to tell), and what to warn of."""

    text: str = ""
    bytes_per_second: float | None = None
    warning: str | None = None


@dataclass(frozen=True, order=True)
class Place:
    """A rank and the node it runs on."""

    rank: int
    node: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"


def megabytes(bytes_per_second: float) -> str:
    return f"{bytes_per_second / MB:,.0f} MB/s"


def gibibytes(count: float) -> str:
    """An amount in the unit that fits it, from GiB down to bytes."""
    if count >= 0.1 * GIB:
        return f"{count / GIB:,.1f} GiB"
    small = f"{count / 2**10:,.0f} KiB" if count >= 2**10 else f"{count:.0f} bytes"
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else small

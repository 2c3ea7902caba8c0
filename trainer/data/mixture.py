"""Which source is due: shares that may change at named positions of the token stream, in exact integers.

A source is entitled to ∫ weight over the stream so far. Whenever a document ends, the source with the largest deficit
- its entitlement less what it has given - gives the next one. Deficits sum to zero, so the chosen one is never ahead,
and no source is ever ahead of its entitlement by a whole document. A source whose weight becomes 0 gives no further
document; what it was owed then falls to the others. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm


class Mixture:
    """Piecewise constant weights over stream positions.

    Args:
        names: of the sources, in the order of all lists here.
        stages: (first position, weight by source), rising, the first at 0; weights are parts of their own sum.
        pays_debts: a source that a stage leaves out still gets what it was owed before, as in order version 2.
    """

    def __init__(
        self, names: Sequence[str], stages: Sequence[tuple[int, Mapping[str, float]]], *, pays_debts: bool = False
    ) -> None:
        assert stages[0][0] == 0
        self.pays_debts = pays_debts
        self._starts = [start for start, _ in stages]
        # What a person writes (0.1) is meant exactly, not as the nearest binary fraction.
        parts = [[Fraction(repr(weights.get(name, 0))) for name in names] for _, weights in stages]
        shares = [[part / sum(row) for part in row] for row in parts]
        self.scale = lcm(*(share.denominator for row in shares for share in row))
        self._weights = [[int(share * self.scale) for share in row] for row in shares]
        self._entitled = [[0] * len(names)]
        for stage, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            so_far = zip(self._entitled[stage], self._weights[stage], strict=True)
            self._entitled.append([entitled + weight * (last - first) for entitled, weight in so_far])

    def entitled(self, position: int) -> list[int]:
        """Tokens × `scale` that each source is entitled to of the first `position`."""
        stage = bisect_right(self._starts, position) - 1
        passed = position - self._starts[stage]
        return [e + w * passed for e, w in zip(self._entitled[stage], self._weights[stage], strict=True)]

    def due(self, given: Sequence[int]) -> int:
        """The source whose document comes next when `given` tokens have been drawn of each."""
        position = sum(given)
        deficits = [e - self.scale * g for e, g in zip(self.entitled(position), given, strict=True)]
        weights = self._weights[bisect_right(self._starts, position) - 1]
        # Of those that have a share now: what a source was owed when its weight became 0 it does not get any more.
        allowed = [source for source in range(len(given)) if weights[source] or self.pays_debts]
        return max(allowed, key=lambda source: (deficits[source], weights[source] > 0, -source))

    def leaves_out(self, position: int) -> bool:
        """Whether a later stage that has shaped the first `position` tokens leaves a source out."""
        return any(0 in weights for weights in self._weights[1 : self.stages_begun(position)])

    def stages_begun(self, position: int) -> int:
        """How many stages have shaped the first `position` tokens; those after may still be changed."""
        return max(1, bisect_left(self._starts, position))

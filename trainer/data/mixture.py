"""Choose the next source: weights that may change at given positions of the token stream, in exact integers.

A source is entitled to ∫ weight over the stream so far. Whenever a document ends, the next one comes from the source
with
the largest deficit: its entitlement minus its drawn tokens. Deficits sum to zero, so the chosen source is never ahead,
and no source is ever ahead of its entitlement by a whole document. A source whose weight becomes 0 gives no further
document; its deficit is shared by the others. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm


class Mixture:
    """Piecewise constant weights over stream positions.

    Args:
        names: the sources, in the order of all lists here.
        stages: (first position, weight by source), in rising order, the first at 0; weights are relative to their sum.
        pays_debts: a source that a stage leaves out still gets its earlier deficit, as in order version 2.
    """

    def __init__(
        self, names: Sequence[str], stages: Sequence[tuple[int, Mapping[str, float]]], *, pays_debts: bool = False
    ) -> None:
        assert stages[0][0] == 0
        self.pays_debts = pays_debts
        self._starts = [start for start, _ in stages]
        # A written 0.1 means exactly 0.1, not the nearest binary fraction.
        parts = [[Fraction(repr(weights.get(name, 0))) for name in names] for _, weights in stages]
        shares = [[part / sum(row) for part in row] for row in parts]
        self.scale = lcm(*(share.denominator for row in shares for share in row))
        self._weights = [[int(share * self.scale) for share in row] for row in shares]
        self._entitled = [[0] * len(names)]
        for stage, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            so_far = zip(self._entitled[stage], self._weights[stage], strict=True)
            self._entitled.append([entitled + weight * (last - first) for entitled, weight in so_far])

    def entitled(self, position: int) -> list[int]:
        """Entitlement of each source after `position` tokens, times `scale`."""
        stage = bisect_right(self._starts, position) - 1
        passed = position - self._starts[stage]
        return [e + w * passed for e, w in zip(self._entitled[stage], self._weights[stage], strict=True)]

    def due(self, given: Sequence[int]) -> int:
        """The source of the next document after `given` tokens were drawn from each."""
        position = sum(given)
        deficits = [e - self.scale * g for e, g in zip(self.entitled(position), given, strict=True)]
        weights = self._weights[bisect_right(self._starts, position) - 1]
        # Only sources with a weight now: a source whose weight became 0 loses its deficit.
        allowed = [source for source in range(len(given)) if weights[source] or self.pays_debts]
        return max(allowed, key=lambda source: (deficits[source], weights[source] > 0, -source))

    def leaves_out(self, position: int) -> bool:
        """Whether a stage that has begun within the first `position` tokens, except the first, leaves a source out."""
        return any(0 in weights for weights in self._weights[1 : self.stages_begun(position)])

    def stages_begun(self, position: int) -> int:
        """Number of stages that have begun within the first `position` tokens; later ones may still be changed."""
        return max(1, bisect_left(self._starts, position))

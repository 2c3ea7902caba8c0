"""Whether the sources can give a run's tokens within their caps of epochs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from trainer.data.mixture import Mixture
from trainer.errors import DataError
from trainer.spec import MixSpec, StageSpec


@dataclass(frozen=True)
class Amount:
    """What a source holds: training tokens, those of its longest document, and how the number is meant."""

    tokens: int
    longest: int
    meant: str = ""


def stages_of(mix: Mapping[str, MixSpec], curriculum: Sequence[StageSpec]) -> list[tuple[int, Mapping[str, float]]]:
    """Weights by the stream position from which they hold, for `Mixture`."""
    first = {name: source.weight for name, source in mix.items()}
    return [(0, first), *((stage.from_tokens, stage.weights) for stage in curriculum if stage.weights is not None)]


def end_of(position: int, tokens: int, skip: Sequence[tuple[int, int]]) -> int:
    """Where the stream stands after `tokens` more that are trained on; `skip` as in TokensSpec."""
    end = position + tokens
    for first, last in sorted(skip):
        if first < end and last > position:
            end += last - max(first, position)
    return end


def no_tokens(source: str) -> DataError:
    return DataError(f"source '{source}' has no training tokens; remove it from the mix or add documents")


def refuse_too_little(
    mixture: Mixture,
    mix: Mapping[str, MixSpec],
    amounts: Mapping[str, Amount],
    end: int,
    drawn: Sequence[int] | None = None,
) -> None:
    """Refuse a stream of `end` tokens that would repeat a source beyond its `max_epochs`.

    A source ends at most one document above its share, so the check is safe and nothing fails later. Not counted is
    what a source that a stage leaves out was owed, a few documents that the others then give.

    Args:
        drawn: tokens that each source has given before, in the order of `mix`.

    Raises:
        DataError: names source, tokens needed, tokens allowed and the remedy.
    """
    for (name, source), entitled, before in zip(
        mix.items(), mixture.entitled(end), drawn or [0] * len(mix), strict=True
    ):
        there = amounts[name]
        if not there.tokens:
            raise no_tokens(name)
        share = -(-entitled // mixture.scale)
        needed = max(before, min(end, share + there.longest - 1))
        allowed = floor(Fraction(repr(source.max_epochs)) * there.tokens)
        if needed > allowed:
            raise DataError(
                f"source '{name}' would need {needed:,} tokens, but {there.tokens:,}{there.meant} × max_epochs "
                f"{source.max_epochs:g} = {allowed:,}; get more of it, lower its weight, raise its max_epochs to "
                f"{ceil(100 * needed / there.tokens) / 100:g} or train for fewer steps"
            )

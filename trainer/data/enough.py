"""Whether the sources have enough tokens for a run within their epoch caps. Imports no torch."""

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
    """Size of a source: training tokens, tokens of its longest document, and a note on how the number was obtained."""

    tokens: int
    longest: int
    meant: str = ""


def stages_of(mix: Mapping[str, MixSpec], curriculum: Sequence[StageSpec]) -> list[tuple[int, Mapping[str, float]]]:
    """Weights by the stream position from which they apply, for `Mixture`."""
    first = {name: source.weight for name, source in mix.items()}
    return [(0, first), *((stage.from_tokens, stage.weights) for stage in curriculum if stage.weights is not None)]


def end_of(position: int, tokens: int, skip: Sequence[tuple[int, int]]) -> int:
    """The stream position after `tokens` more trained tokens; `skip` as in TokensSpec."""
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

    A source ends at most one document above its share, so a run that passes cannot fail later. Not counted is the
    deficit of a source that a stage leaves out: a few documents, which the other sources then provide.

    Args:
        drawn: tokens already drawn from each source, in the order of `mix`.

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

"""The order of all training tokens: a pure function of (shards, mix, curriculum, seed, order version).

The stream is endless and independent of rows, ranks and workers: trainer/data/mixture.py chooses the next source,
trainer/data/order.py its document. Both depend only on the tokens drawn so far, so these counts are the whole state.
Resuming looks up each source's position; no past choice is replayed. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trainer.data.enough import Amount, end_of, no_tokens, refuse_too_little, stages_of
from trainer.data.mixture import Mixture
from trainer.data.order import DEBTS_PAID_VERSION, ORDER_VERSION, SourceOrder
from trainer.errors import DataError
from trainer.spec import MixSpec, StageSpec


@dataclass(frozen=True)
class Cursor:
    """A position in the stream. `drawn` and `skipped`: tokens by source; skipped tokens are drawn but not trained
    on."""

    order_version: int
    plan_digest: str
    drawn: dict[str, int]
    skipped: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """Raises DataError if `value` was not written by `to_dict`."""
        try:
            cursor = cls(
                order_version=int(value["order_version"]),
                plan_digest=str(value["plan_digest"]),
                drawn={str(name): int(count) for name, count in value["drawn"].items()},
                skipped={str(name): int(count) for name, count in value["skipped"].items()},
            )
            # KeyError too: each source has both counts.
            sound = all(0 <= cursor.skipped[name] <= count for name, count in cursor.drawn.items())
            if not sound or len(cursor.skipped) != len(cursor.drawn):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError("the checkpoint's data cursor cannot be read; resume from another checkpoint") from None
        return cursor

    @property
    def trained(self) -> dict[str, int]:
        """The ledger: trained tokens by source."""
        return {name: count - self.skipped[name] for name, count in self.drawn.items()}


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of a source's document. `continues`: its token `stop` follows in the stream."""

    source: int
    document: int
    start: int
    stop: int
    continues: bool


class TokenStream:
    """The mixed stream from a cursor on.

    Args:
        lengths: tokens of each document, by source; the names and their order are those of `mix`.
        data_digest: digest of the manifest with these lengths.
        earlier: digest and documents of each source for each earlier generation, oldest first. A cursor of one
            continues into later generations, or, if it is beyond a source's first epoch, stays with that source's old
            documents.
        curriculum: later weights, by the position from which they apply.
        skip: ranges [first, last) of stream positions, in tokens, that are drawn but not yielded.
        cursor: from `cursor()`; None for the start.
        scores: of each document of the sources that are ordered by other scores than the length.

    Raises:
        DataError: a source has no tokens, or the cursor is of another plan.
    """

    def __init__(
        self,
        lengths: Mapping[str, NDArray[np.integer]],
        mix: dict[str, MixSpec],
        seed: int,
        data_digest: str,
        *,
        earlier: Sequence[tuple[str, dict[str, int]]] = (),
        curriculum: Sequence[StageSpec] = (),
        skip: Sequence[tuple[int, int]] = (),
        cursor: Cursor | None = None,
        scores: Mapping[str, NDArray[np.floating]] | None = None,
    ) -> None:
        self.names = list(mix)
        self._scores = scores or {}
        self._seed = seed
        self.left_out = 0  # documents of later generations
        self._data = [*earlier, (data_digest, {name: len(lengths[name]) for name in mix})]
        self._stages = stages_of(mix, curriculum)
        self._mixture = Mixture(self.names, self._stages)
        if (
            cursor
            and cursor.order_version == DEBTS_PAID_VERSION
            and self._mixture.leaves_out(sum(cursor.drawn.values()))
        ):
            self._mixture = Mixture(self.names, self._stages, pays_debts=True)
        self._mix = mix
        self._orders = self._ordered(lengths)
        if cursor is not None:
            known = self._checked(cursor)
            grown = [order for order in self._orders if order.tokens_of(known) < order.tokens]
            if any(cursor.drawn[order.name] > order.tokens_of(known) for order in grown):
                self.left_out = sum(self._data[-1][1].values()) - sum(self._data[known - 1][1].values())
                self._data = self._data[:known]
                self._orders = self._ordered({name: lengths[name][: self._data[-1][1][name]] for name in self.names})
        for order in self._orders:
            if not order.tokens:
                raise no_tokens(order.name)
        self._skip = sorted(skip)
        self._drawn = [cursor.drawn[name] if cursor else 0 for name in self.names]
        self._skipped = [cursor.skipped[name] if cursor else 0 for name in self.names]
        self._open: tuple[int, int, int, int] | None = None  # source, document, length, next token
        for source, order in enumerate(self._orders):
            document, offset = order.seek(self._drawn[source])
            if document >= 0:
                assert self._open is None, "two documents are open"
                self._open = (source, document, int(order.lengths[document]), offset)

    def _ordered(self, lengths: Mapping[str, NDArray[np.integer]]) -> list[SourceOrder]:
        ends = {name: [0, *(documents[name] for _, documents in self._data)] for name in self.names}
        return [
            SourceOrder(name, lengths[name], self._seed, np.diff(ends[name]).tolist(), *self._sorting(name, lengths))
            for name in self.names
        ]

    def _sorting(
        self, name: str, lengths: Mapping[str, NDArray[np.integer]]
    ) -> tuple[NDArray[np.floating] | None, int | None]:
        """The score by which the documents of a source ascend, and the number of bands."""
        if (order := self._mix[name].order) is None:
            return None, None
        every = lengths[name] if order.by == "length" else self._scores[name]
        scores = every[: len(lengths[name])].astype(np.float64)
        return (scores if order.ascending else -scores), order.bands

    @property
    def position(self) -> int:
        """Tokens drawn so far."""
        return sum(self._drawn)

    def cursor(self) -> Cursor:
        named = [dict(zip(self.names, counts, strict=True)) for counts in (self._drawn, self._skipped)]
        return Cursor(self._version(self.position), self.digest(self.position), *named)

    def _version(self, position: int) -> int:
        """The lowest order version that gives this order of the first `position` tokens."""
        return (
            DEBTS_PAID_VERSION if self._mixture.pays_debts or not self._mixture.leaves_out(position) else ORDER_VERSION
        )

    def digest(self, position: int = 0, generation: int | None = None) -> str:
        """Identity of the order of the first `position` tokens, by default with all generations of the data.

        It does not include caps and stages that begin later, because both may change during a run.
        """
        data_digest = self._data[-1 if generation is None else generation][0]
        begun = self._stages[: self._mixture.stages_begun(position)]
        weights = [[start, [[name, repr(weights.get(name, 0))] for name in self.names]] for start, weights in begun]
        identity = [self._version(position), data_digest, self._seed, weights]
        if sorted_by := {name: order.model_dump() for name in self.names if (order := self._mix[name].order)}:
            identity.append(sorted_by)
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def take(self, count: int) -> list[Segment]:
        """The next `count` tokens as segments in order; tokens in skipped ranges are left out and not counted."""
        segments: list[Segment] = []
        while count:
            source, document, length, start = self._open or self._choose()
            kept, run = self._run(length - start)
            if kept:
                run = min(run, count)
            stop = start + run
            self._drawn[source] += run
            self._open = (source, document, length, stop) if stop < length else None
            if kept:
                count -= run
                continues = stop < length and self._run(1)[0]
                segments.append(Segment(source, document, start, stop, continues))
            else:
                self._skipped[source] += run
        return segments

    def check_caps(self, tokens: int) -> None:
        """Refuse a run of `tokens` more tokens that would repeat a source beyond its `max_epochs`.

        Raises:
            DataError: as `refuse_too_little`.
        """
        amounts = [Amount(order.tokens, order.longest) for order in self._orders]
        end = end_of(self.position, tokens, self._skip)
        refuse_too_little(self._mixture, self._mix, dict(zip(self.names, amounts, strict=True)), end, self._drawn)

    def epochs(self, cursor: Cursor) -> dict[str, float]:
        """Epochs of each source at `cursor`."""
        return {order.name: cursor.drawn[order.name] / order.tokens for order in self._orders}

    def _choose(self) -> tuple[int, int, int, int]:
        source = self._mixture.due(self._drawn)
        document, length = self._orders[source].next()
        return source, document, length, 0

    def _run(self, limit: int) -> tuple[bool, int]:
        """Whether the next token is kept, and for how many tokens (at most `limit`) this holds."""
        position = self.position
        for first, last in self._skip:
            if first <= position < last:
                return False, min(limit, last - position)
            if first > position:
                return True, min(limit, first - position)
        return True, limit

    def _generation_of(self, cursor: Cursor) -> int:
        """The number, from 1, of the newest generation to which a cursor may belong; 0 for none."""
        position = sum(cursor.drawn.values())
        numbers = range(len(self._data), 0, -1)
        return next((n for n in numbers if self.digest(position, n - 1) == cursor.plan_digest), 0)

    def _checked(self, cursor: Cursor) -> int:
        """The generation of a cursor, counted as in `_generation_of`."""
        if cursor.order_version not in (DEBTS_PAID_VERSION, ORDER_VERSION):
            raise DataError(
                f"the checkpoint's data order has version {cursor.order_version}, this code has {ORDER_VERSION}; "
                "resume with the code that wrote it, or start a new run"
            )
        known = self._generation_of(cursor)
        if not known or set(cursor.drawn) != set(self.names):
            raise DataError(
                "the checkpoint was trained on other shards, mix weights, curriculum or data seed than this run names, "
                "or with another order of a source; give those back (stages after the checkpoint may change), or start "
                "a new run"
            )
        return known

"""Pack the tokens of a step into rows; a pure function of the step, so every rank gets the same rows.

Nothing is carried over, dropped or padded: the rows hold exactly the step's tokens. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

from trainer.data.plan import Segment
from trainer.spec import Packing


def lay_out(segments: Sequence[Segment], seq_len: int, packing: Packing) -> list[list[Segment]]:
    """The rows of a step; its number of tokens must be a multiple of the row length."""
    return (best_fit if packing == "best_fit" else concatenate)(segments, seq_len)


def concatenate(segments: Sequence[Segment], seq_len: int) -> list[list[Segment]]:
    """Rows of `seq_len` tokens in stream order; a document is cut where a row ends."""
    rows: list[list[Segment]] = []
    room = 0
    for segment in segments:
        while True:
            if not room:
                rows.append([])
                room = seq_len
            head, tail = cut(segment, room)
            rows[-1].append(head)
            room -= head.stop - head.start
            if tail is None:
                break
            segment = tail
    return rows


def best_fit(segments: Sequence[Segment], seq_len: int) -> list[list[Segment]]:
    """Rows of `seq_len` tokens by best-fit decreasing, which cuts few documents.

    A document longer than a row gives full rows and a remainder. Then, longest first, each piece goes to the row where
    it leaves the least room (Ding et al. 2024, arXiv 2404.10830). Pieces that fit nowhere are cut to fill the gaps,
    widest
    first: where that paper pads or truncates, a few documents are cut.
    """
    rows: list[list[tuple[int, Segment]]] = []
    pieces: list[tuple[int, int, Segment]] = []  # negative length, position in the stream, piece
    for place, segment in enumerate(segments):
        rest: Segment | None = segment
        while rest is not None and rest.stop - rest.start > seq_len:
            whole, rest = cut(rest, seq_len)
            rows.append([(place, whole)])
        if rest is not None:
            pieces.append((rest.start - rest.stop, place, rest))
    pieces.sort(key=lambda piece: piece[:2])
    total = sum(segment.stop - segment.start for segment in segments)
    open_rows: list[tuple[int, int]] = [(seq_len, row) for row in range(len(rows), -(-total // seq_len))]  # room, row
    rows += [[] for _ in open_rows]
    left: list[tuple[int, Segment]] = []
    for minus_length, place, piece in pieces:
        found = bisect_left(open_rows, (-minus_length, 0))
        if found == len(open_rows):
            left.append((place, piece))
            continue
        room, row = open_rows.pop(found)
        rows[row].append((place, piece))
        if room + minus_length:
            insort(open_rows, (room + minus_length, row))
    for place, piece in left:
        rest = piece
        while rest is not None:
            room, row = open_rows.pop()
            head, rest = cut(rest, room)
            rows[row].append((place, head))
            if room > head.stop - head.start:
                insort(open_rows, (room - (head.stop - head.start), row))
    for pieces_of_row in rows:
        pieces_of_row.sort(key=lambda placed: placed[0])
    rows.sort(key=lambda row: row[0][0])  # stream order; else the longest would all be on the first rank
    return [[segment for _, segment in row] for row in rows]


def cut(segment: Segment, length: int) -> tuple[Segment, Segment | None]:
    """The first `length` tokens of a segment, and the rest or None."""
    middle = segment.start + length
    if middle >= segment.stop:
        return segment, None
    return replace(segment, stop=middle, continues=True), replace(segment, start=middle)

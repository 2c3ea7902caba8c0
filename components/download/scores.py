"""Scores of rows, for sources whose documents are trained in the order of a column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from components.download.readers import rows
from components.download.texts import Row
from manifests.dataspec import TextSpec
from trainer.errors import DataError


def rows_of(
    spec: TextSpec, files: Iterable[tuple[Path, str]], advance: Callable[[int], None]
) -> Iterator[tuple[str, Row]]:
    """Yield (location, values of `spec.columns`, then that of the score's column if there is one) of each row.

    Args:
        files: path and name of each file.

    Raises:
        DataError, OSError: as `readers.rows`.
    """
    score = spec.score_column
    columns = spec.columns if score is None or score in spec.columns else [*spec.columns, score]
    for path, name in files:
        try:
            for where, values in rows(path, name, columns, advance):
                yield where, [*values[: len(spec.columns)], *([values[columns.index(score)]] if score else [])]
        except DataError as error:
            if score is None or f"column '{score}'" not in str(error):
                raise
            raise DataError(str(error).replace("set text_column to", "set order.column to")) from None


def score_of(where: str, row: Row, column: str | None, text: str | None) -> float | None:
    """The score of a row of `rows_of`; None without a column, and of a row without text.

    Raises:
        DataError: it has text, but no finite number as its score.
    """
    if column is None or not text or text.isspace():
        return None
    from trainer.data.scores import number  # NumPy comes with it

    try:
        return number(row[-1])
    except ValueError as error:
        raise DataError(
            f"{where}: column '{column}' holds {error}, but order.column needs a finite number in each row; fix or "
            "remove the row, or order by compression or length"
        ) from None

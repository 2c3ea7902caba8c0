"""The filters. A new one is a file with such a class and a line in `chosen`."""

from __future__ import annotations

from components.hygiene.contamination import Contamination
from components.hygiene.duplicates import ExactDuplicates
from components.hygiene.filters import Filter
from manifests.dataspec import HygieneSpec


def chosen(spec: HygieneSpec, evaluation: dict[str, list[str]]) -> list[Filter]:
    """The filters that the spec enables, in the order of the report.

    Args:
        evaluation: the texts of each evaluation set of the spec.
    """
    filters = list[Filter]()
    if spec.exact_duplicates:
        filters.append(ExactDuplicates())
    if spec.evaluation:
        filters.append(Contamination(evaluation, spec.ngram))
    return filters

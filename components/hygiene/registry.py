"""The filters. A new one is a file with such a class and a line in `chosen`."""

from __future__ import annotations

from collections.abc import Mapping

from components.hygiene.contamination import Contamination
from components.hygiene.duplicates import ExactDuplicates
from components.hygiene.filters import Filter
from components.hygiene.near_duplicates import NearDuplicates
from components.hygiene.quality import Quality
from manifests.dataspec import HygieneSpec


def chosen(spec: HygieneSpec, evaluation: dict[str, list[str]], domain_of: Mapping[str, str]) -> list[Filter]:
    """The filters that the spec enables, in the order of the report.

    Args:
        evaluation: the texts of each evaluation set of the spec.
        domain_of: the domain of each source.
    """
    filters = list[Filter]()
    if spec.exact_duplicates:
        filters.append(ExactDuplicates())
    if spec.near_duplicates:
        filters.append(NearDuplicates(spec.near_duplicates.threshold))
    if spec.quality:
        filters.append(Quality(spec.quality.domains, domain_of))
    if spec.evaluation:
        filters.append(Contamination(evaluation, spec.ngram))
    return filters

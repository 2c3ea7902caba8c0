"""A gate: a condition on what was measured of a trained model, without which it is not exported. Imports no torch.

Metrics: `bits_per_byte.D`, `loss.D` and `perplexity.D` of held-out text, where D is a domain or `all`, and
`benchmarks.TASK.METRIC`. trainer/gate.py compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from trainer.specbase import Spec

HELDOUT = ("bits_per_byte", "loss", "perplexity")
BENCHMARKS = "benchmarks"
Bound = Annotated[float, Field(allow_inf_nan=False)]  # nothing passes NaN


class GateSpec(Spec):
    """One of three comparisons of `metric`; equality with a bound passes.

    `better_than`: another evaluated run: its name, its folder, its export or its eval.json. The model must be better by
    at least `by`, in the metric's own unit; 0 lets an equal one pass.
    """

    metric: Annotated[str, Field(min_length=1)]
    at_least: Bound | None = None
    at_most: Bound | None = None
    better_than: Annotated[str, Field(min_length=1)] | None = None
    by: Annotated[Bound, Field(ge=0)] = 0.0

    @property
    def names_a_path(self) -> bool:
        """Whether `better_than` is a path and not the name of a run."""
        return self.better_than is not None and ("/" in self.better_than or self.better_than.endswith(".json"))

    def beside(self, folder: str) -> Self:
        """The same, with a relative path that starts in `folder`."""
        if self.better_than is None or not self.names_a_path:
            return self
        return self.model_copy(update={"better_than": str(Path(folder, self.better_than))})

    @model_validator(mode="after")
    def _metric_is_known(self) -> Self:
        kind, *rest = self.metric.split(".")
        known = (kind in HELDOUT and len(rest) == 1) or (kind == BENCHMARKS and len(rest) > 1)
        if not (known and all(rest)):
            heldout = ", ".join(f"{each}.D" for each in HELDOUT)
            raise ValueError(
                f"metric '{self.metric}' is unknown; write {heldout} (D a domain or all) or {BENCHMARKS}.TASK.METRIC"
            )
        return self

    @model_validator(mode="after")
    def _compares_once(self) -> Self:
        given = [name for name in ("at_least", "at_most", "better_than") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"has {' and '.join(given)}" if given else "compares with nothing"
            raise ValueError(f"{said}; give one of at_least, at_most, better_than")
        if self.by and self.better_than is None:
            raise ValueError(f"by {self.by:g} is for better_than; remove it")
        return self

"""A memory budget of activation checkpointing: how many layers must be recomputed, by arithmetic. Imports no torch."""

from __future__ import annotations

from trainer.arithmetic.activations import activations
from trainer.arithmetic.memory import counted_precision, step_memory
from trainer.errors import SpecError
from trainer.parallel.layout import Layout
from trainer.runtimespec import RecomputeSpec
from trainer.spec import TrainSpec

GIB = 2**30


def within_budget(spec: TrainSpec, layout: Layout, rank_bytes: float) -> tuple[TrainSpec, str]:
    """The spec with the fewest layers recomputed that its budget needs, and that in words; "" if it has no budget.

    Args:
        rank_bytes: memory of the smallest GPU, or on CPUs a rank's share of the machine's: what budget auto means.

    Raises:
        SpecError: a step does not fit in the budget, or the ranks cannot recompute so.
    """
    policy = spec.runtime.activation_checkpointing
    if policy == "sqrt" and layout.data == "fsdp":
        raise SpecError(
            "train.runtime.activation_checkpointing sqrt: FSDP2 gathers layers one by one, so groups of them cannot be "
            "recomputed together; write full, or {every: 2}"
        )
    if not isinstance(policy, RecomputeSpec) or policy.budget_gib is None:
        return spec, ""
    limit = rank_bytes if policy.budget_gib == "auto" else policy.budget_gib * GIB
    none = spec.updated({"runtime": {"activation_checkpointing": "none"}})
    memory, tokens = step_memory(none, layout), spec.batch.rows * spec.tokens.seq_len
    rest, layers = memory.total - memory.activations, len(spec.model.layers)
    layers += spec.model.mtp.depth if spec.model.mtp else 0
    totals = [memory.total]
    for count in range(1, layers + 1):
        if totals[-1] <= limit:
            break
        found = activations(spec.model, spec.tokens.seq_len, RecomputeSpec(layers=count), counted_precision(spec))
        totals.append(rest + found.peak * tokens)
    written = policy.budget_gib if policy.budget_gib == "auto" else f"{policy.budget_gib:g}"
    where = f"train.runtime.activation_checkpointing.budget_gib {written}"
    if totals[-1] > limit:
        least = min(totals)
        remedy = "more GPUs, or less of train.model" if spec.batch.rows == 1 else "lower train.batch.micro_batch_rows"
        raise SpecError(
            f"{where}: a step takes {least / GIB:.1f} GiB on each rank at the least, with {totals.index(least)} of "
            f"{layers} layers recomputed, and there are {limit / GIB:.1f}; raise it, or {remedy}"
        )
    count = len(totals) - 1
    said = (
        f"{where}: {count} of {layers} layers are recomputed; a step then takes {totals[-1] / GIB:.1f} of "
        f"{limit / GIB:.1f} GiB on each rank"
    )
    if not count:
        return none, said
    chosen = {"layers": count, "every": None, "budget_gib": None}
    return spec.updated({"runtime": {"activation_checkpointing": chosen}}), said

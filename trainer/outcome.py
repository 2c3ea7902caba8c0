"""The numbers of a step: they stay on the device until its last kernel is launched, then the host reads them at once.

So the device never waits for the host within a step. What the host needs to have decided, whether to skip the step, is
decided on the device too; the limits of the spike guard follow from earlier steps (trainer/spikes.py).

Legend: L MoE sublayers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.data.loader import StepBatch
from trainer.process.stopping import STOP_CODES
from trainer.spikes import SKIP_REASONS, Limits, SkipReason

STARVED_SHARE = 0.1  # of the mean load; an expert below this hardly learns


@dataclass(frozen=True)
class Totals:
    """Totals over all ranks, on the device.

    Attributes:
        sums: float64: Σ cross-entropy, Σ router balance, then Σ cross-entropy and number of labels of each further
            objective.
        votes: float64: ranks that want each of STOP_CODES.
        expert_load_LE: int64 tokens by expert.
    """

    sums: Tensor
    votes: Tensor
    expert_load_LE: Tensor

    def loss(self, num_labels: int) -> Tensor:
        """The mean cross-entropy, rounded as the host would."""
        return self.sums[0] / torch.full_like(self.sums[0], num_labels)


@dataclass(frozen=True)
class Update:
    """What became of the gradients, on the device, without dimensions.

    Attributes:
        reason: float64: place in SKIP_REASONS of why the step is skipped; -1: it is not.
    """

    grad_norm: Tensor
    clipped: Tensor
    reason: Tensor

    @property
    def skip(self) -> Tensor:
        return self.reason >= 0


@dataclass(frozen=True)
class Outcome:
    """A step's numbers on the host, equal on all ranks.

    Attributes:
        loss: cross-entropy per label; NaN without labels.
        auxiliary: other objectives.
        stop_code: agreed exit code; 0: continue.
        expert_load_max_ratio: the largest load of an expert in its sublayer's mean; 1 without experts.
        expert_starved_ratio: share of experts below STARVED_SHARE of the mean, in the worst sublayer.
    """

    loss: float
    auxiliary: dict[str, float]
    stop_code: int
    grad_norm: float
    clipped: bool
    skipped: SkipReason | None
    expert_load_max_ratio: float
    expert_starved_ratio: float


def reduce_totals(sums: Tensor, expert_load_LE: Tensor, stop_code: int) -> Totals:
    """One all-reduce for everything on which the ranks must agree; float64 is exact for counts up to 2^53."""
    votes = sums.new_zeros(len(STOP_CODES))
    if stop_code:
        votes[STOP_CODES.index(stop_code)].fill_(1)
    parts = [sums, votes, expert_load_LE.flatten().double()]
    vector = torch.cat(parts)
    dist.all_reduce(vector)
    sums, votes, loads = vector.split([part.numel() for part in parts])
    return Totals(sums, votes, loads.view_as(expert_load_LE).to(torch.int64))


def why_skipped(loss: Tensor, grad_norm: Tensor, limits: Limits) -> Tensor:
    """`Update.reason` of this rank: values that are not finite, or above what the spike guard allows."""
    reason = torch.full_like(grad_norm, -1)
    reason.masked_fill_(grad_norm > limits.grad_norm, SKIP_REASONS.index("gradient_spike"))
    reason.masked_fill_(loss > limits.loss, SKIP_REASONS.index("loss_spike"))
    return reason.masked_fill_(~(loss.isfinite() & grad_norm.isfinite()), SKIP_REASONS.index("nonfinite"))


def agree(reason: Tensor) -> Tensor:
    """The same reason on every rank, if any rank has one: different processors may round a norm across a limit."""
    if dist.get_world_size() > 1:
        dist.all_reduce(reason, dist.ReduceOp.MAX)
    return reason


def no_update(totals: Totals) -> Update:
    """That of a step without any label."""
    nothing = torch.zeros_like(totals.sums[0])
    return Update(nothing, nothing, torch.full_like(nothing, SKIP_REASONS.index("no_answers")))


def read(totals: Totals, update: Update, batch: StepBatch) -> Outcome:
    """Wait until the device has finished the step: the only time that the host does."""
    of_experts = _load_ratios(totals.expert_load_LE.double())
    parts = [totals.sums, totals.votes, torch.stack([update.grad_norm, update.clipped, update.reason, *of_experts])]
    sizes = [part.numel() for part in parts]
    values = iter(torch.cat(parts).tolist())
    (ce_sum, aux_sum, *mtp), votes, numbers = ([next(values) for _ in range(size)] for size in sizes)
    grad_norm, clipped, reason, *ratios = numbers
    auxiliary = {"router_balance": aux_sum / batch.num_rows} if len(totals.expert_load_LE) else {}
    depth = len(mtp) // 2
    for k, (mtp_sum, labels) in enumerate(zip(mtp[:depth], mtp[depth:], strict=True), start=1):
        auxiliary[f"mtp_{k}"] = mtp_sum / max(labels, 1)
    max_ratio, starved = ratios or (1.0, 0.0)
    return Outcome(
        loss=ce_sum / batch.num_labels if batch.num_labels else math.nan,
        auxiliary=auxiliary,
        stop_code=int(next((code for code, ranks in zip(STOP_CODES, votes, strict=True) if ranks), 0)),
        grad_norm=grad_norm,
        clipped=bool(clipped),
        skipped=SKIP_REASONS[int(reason)] if reason >= 0 else None,
        expert_load_max_ratio=max_ratio,
        expert_starved_ratio=starved,
    )


def _load_ratios(load_LE: Tensor) -> list[Tensor]:
    """The two of an Outcome; none without experts."""
    if not load_LE.numel():
        return []
    mean_L1 = load_LE.mean(1, keepdim=True)
    starved_L = (load_LE < STARVED_SHARE * mean_L1).double().mean(1)
    return [(load_LE / mean_L1).max(), starved_L.max()]

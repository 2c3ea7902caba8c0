"""Muon and AdamW behind one interface: step, one factor on all learning rates, one flat state for the checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.modelspec import ModelSpec
from trainer.ops.orthogonalise import orthogonalise_
from trainer.optim.adamw import AdamW
from trainer.optim.conditional import scale_
from trainer.optim.fastest import Agree, FastestByShape, Orthogonalise
from trainer.optim.muon import Muon
from trainer.optim.rules import Assignment, assign
from trainer.optim.shares import Share, gather_weights, local
from trainer.parallel.gradients import unscale
from trainer.spec import OptimizerSpec

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Optimizers:
    """The optimizers of one model.

    Attributes:
        members: the torch optimizers by name ("muon", "adamw"); one is absent when it has no parameter.
        peak_learning_rate: learning rate at factor 1 of the optimizer to which schedule and logs refer.
        table: the assignment of each parameter.
    """

    def __init__(
        self,
        members: dict[str, Muon | AdamW],
        names: dict[Tensor, str],
        table: list[Assignment],
        peak_learning_rate: float,
        shares: list[Share],
    ) -> None:
        self.members = members
        self._shares = shares
        self.peak_learning_rate = peak_learning_rate
        self.table = table
        self._names = names
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def _groups(self) -> Iterable[dict]:
        return (group for member in self.members.values() for group in member.param_groups)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self._groups() for parameter in group["params"]]

    def set_learning_rate_factor(self, factor: float) -> None:
        """Set every group's rate to `factor` times its peak."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor

    @property
    def learning_rate(self) -> float:
        """The rate in force of the optimizer that `peak_learning_rate` belongs to."""
        group = next(iter(self._groups()))
        return self.peak_learning_rate * group["lr"] / group["peak_lr"]

    def step(self, skip: Tensor | None = None) -> None:
        """Update all parameters; a collective of all ranks where they share the work.

        Args:
            skip: bool, no dimensions, on the parameters' device: True leaves parameters and state as they are.
        """
        for member in self.members.values():
            member.step(skip=skip)
        gather_weights(self._shares)
        # Not all of that has been counted, and copies of weights go by it (trainer/ops/narrow.py).
        torch.autograd.graph.increment_version(self.parameters)

    def zero_grad(self) -> None:
        for member in self.members.values():
            member.zero_grad(set_to_none=True)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide all gradients by the loss scale; then clip, step if the norm is finite, and `scaler.update()`."""
        unscale(scaler, self.parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """{"<optimizer>.<parameter>.<quantity>": tensor or DTensor}, for a checkpoint.

        Complete from the start and sharing memory with the optimizers, so that torch.distributed.checkpoint can both
        save from it and load into it. Rates are not in it: the schedule is a function of the step.
        """
        return {
            f"{member_name}.{self._names[parameter]}.{quantity}": value
            for member_name, member in self.members.items()
            for parameter, state in member.state.items()
            for quantity, value in state.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` in.

        Raises:
            ValueError: keys or shapes that differ from this model's and optimizer's.
        """
        own = self.state_dict()
        if different := sorted(own.keys() ^ state.keys()):
            raise ValueError(
                f"the optimizer state does not fit: {different[0]} (and {len(different) - 1} more) is in only one of "
                "checkpoint and run; use the optimizer and the model that the checkpoint was written with"
            )
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise ValueError(f"optimizer state {key} has shape {tuple(value.shape)}, not {tuple(own[key].shape)}")
            own[key].copy_(value)


def build_optimizers(
    model: nn.Module,
    spec: OptimizerSpec,
    modelspec: ModelSpec,
    *,
    share_over: DeviceMesh | None = None,
    orthogonalise: Orthogonalise = orthogonalise_,
    agree: Agree = lambda value: value,
) -> Optimizers:
    """Optimizers for every trainable parameter of `model`, grouped by the rules of rules.py.

    A DTensor that is cut along its first dimension (FSDP2, experts) is updated where its rows lie. Each matrix is
    orthogonalised once in the group of ranks that share it, the work spread evenly.

    Args:
        share_over: mesh of one dimension of ranks that all hold the model and its summed gradients (data parallel).
            Each then keeps the state of its part of the rows and updates only those, and `step` exchanges weights.
        orthogonalise: an implementation of `orthogonalise_`, called for shapes for which it is the faster one.
        agree: gives rank 0's value to all ranks, which share what is timed.

    Raises:
        ValueError: a parameter that the rules do not name, or that is cut otherwise.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shares = {name: Share(parameter, share_over) for name, parameter in parameters.items()}
    table = assign([(name, tuple(p.shape)) for name, p in parameters.items()], spec, modelspec)
    mup = modelspec.mup
    groups: dict[tuple[str, float, float, int], list[Assignment]] = defaultdict(list)
    for entry in table:
        stacked = len(entry.stack) if mup else 0
        groups[entry.optimizer, entry.rate_factor, entry.decay * entry.decay_factor, stacked].append(entry)

    of_muon, of_adamw = [], []
    for (optimizer, rate_factor, decay_factor, stacked), entries in groups.items():
        options = spec.muon if optimizer == "muon" else spec.adamw
        group = {
            "params": [parameters[entry.name] for entry in entries],
            "shares": [shares[entry.name] for entry in entries],
            "lr": options.learning_rate * rate_factor,
            "weight_decay": options.weight_decay * decay_factor,
        }
        if optimizer == "muon":
            index = {entry.name: number for number, entry in enumerate(entries)}
            stacks = [tuple(index[name] for name in e.stack) for e in entries if e.stack[0] == e.name]
            # With K layers stacked, √(m/n) of one layer is K^½·√(m/k) of the stack, and as without μP √K comes on top.
            group["spectral_base"] = mup.base_hidden * stacked**2 if mup else None
            of_muon.append({**group, "block_rows": [e.block_rows for e in entries], "stacks": stacks})
        else:
            of_adamw.append(group)

    members: dict[str, Muon | AdamW] = {}
    state_dtype = STATE_DTYPES[spec.state_dtype]
    if of_muon:
        fastest = None if orthogonalise is orthogonalise_ else FastestByShape(orthogonalise, orthogonalise_)
        members["muon"] = muon = Muon(
            of_muon,
            spec.muon.learning_rate,
            spec.muon.momentum,
            spec.muon.nesterov,
            coefficients=spec.muon.coefficients,
            steps=spec.muon.steps,
            state_dtype=state_dtype,
            orthogonalise=fastest,
        )
        if fastest:
            fastest.choose(*muon.batches_alike(), spec.muon.coefficients, spec.muon.steps, agree)
    if of_adamw:
        adamw = spec.adamw
        betas = (adamw.beta1, adamw.beta2)
        members["adamw"] = AdamW(of_adamw, adamw.learning_rate, betas, adamw.eps, state_dtype=state_dtype)
    names = {parameter: name for name, parameter in parameters.items()}
    peak = spec.peak_learning_rate if "muon" in members else spec.adamw.learning_rate
    return Optimizers(members, names, table, peak, list(shares.values()))


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Scale the gradients so that their global 2-norm is at most `max_norm` (None: only measure).

    Gradients that are DTensors count as the whole tensors; then it is a collective of the ranks that share them.

    Returns:
        (norm before clipping in float64, whether it was clipped), both without dimensions and on the gradients' device,
        for the host does not wait. With a norm that is not finite nothing is scaled; skip the step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _total_norm(gradients)
    if max_norm is None:
        return norm, torch.zeros_like(norm, dtype=torch.bool)
    clipped = (norm > max_norm) & norm.isfinite()
    factor = torch.full_like(norm, max_norm) / (norm + 1e-6)  # a number divided by a tensor is rounded twice
    scale_([local(gradient) for gradient in gradients], factor.masked_fill_(~clipped, 1.0))
    return norm, clipped


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together; the parts of those that are cut are summed over the ranks that have them.

    All ranks get the same bits, so that they decide alike.
    """
    by_layout: dict[tuple, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else ()
        by_layout[layout].append(local(gradient))
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for layout, parts in by_layout.items():
        square = torch.nn.utils.get_total_norm(parts).double().square()
        if layout:
            mesh, placements = layout
            for dim, placement in enumerate(placements):
                if not placement.is_replicate():
                    dist.all_reduce(square, group=mesh.get_group(dim))
        total += square
    return total.sqrt()

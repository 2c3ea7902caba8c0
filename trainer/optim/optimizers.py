"""Muon and AdamW behind one interface: step, one factor on all learning rates, one flat state for the checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.modelspec import ModelSpec
from trainer.optim.muon import Muon
from trainer.optim.rules import Assignment, assign
from trainer.spec import OptimizerSpec


class Optimizers:
    """The optimizers of one model.

    Attributes:
        members: the torch optimizers by name ("muon", "adamw"); one is absent when it has no parameter.
        peak_learning_rate: learning rate at factor 1 of the optimizer that the schedule and the logs speak of.
        table: what each parameter got.
    """

    def __init__(
        self,
        members: dict[str, torch.optim.Optimizer],
        names: dict[Tensor, str],
        table: list[Assignment],
        peak_learning_rate: float,
    ) -> None:
        self.members = members
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

    def step(self) -> None:
        for member in self.members.values():
            member.step()

    def zero_grad(self) -> None:
        for member in self.members.values():
            member.zero_grad(set_to_none=True)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide all gradients by the loss scale; then clip, step if the norm is finite, and `scaler.update()`."""
        for member in self.members.values():
            scaler.unscale_(member)

    def state_dict(self) -> dict[str, Tensor]:
        """{"<optimizer>.<parameter>.<quantity>": tensor}, for a checkpoint.

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


def build_optimizers(model: nn.Module, spec: OptimizerSpec, modelspec: ModelSpec) -> Optimizers:
    """Optimizers for every trainable parameter of `model`, grouped by the rules of rules.py.

    Raises:
        ValueError: a parameter that the rules do not name.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    table = assign([(name, tuple(p.shape)) for name, p in parameters.items()], spec, modelspec)
    groups: dict[tuple[str, float, bool], list[Assignment]] = defaultdict(list)
    for entry in table:
        groups[entry.optimizer, entry.rate_factor, entry.decay].append(entry)

    muon_groups, adamw_groups = [], []
    for (optimizer, rate_factor, decay), entries in groups.items():
        options = spec.muon if optimizer == "muon" else spec.adamw
        group = {
            "params": [parameters[entry.name] for entry in entries],
            "lr": options.learning_rate * rate_factor,
            "weight_decay": options.weight_decay if decay else 0.0,
        }
        if optimizer == "muon":
            muon_groups.append({**group, "block_rows": [entry.block_rows for entry in entries]})
        else:
            adamw_groups.append(group)

    members: dict[str, torch.optim.Optimizer] = {}
    if muon_groups:
        muon = spec.muon
        members["muon"] = Muon(
            muon_groups,
            muon.learning_rate,
            muon.momentum,
            muon.nesterov,
            coefficients=muon.coefficients,
            steps=muon.steps,
        )
    if adamw_groups:
        members["adamw"] = _adamw(adamw_groups, spec)
    peak = spec.muon.learning_rate if spec.name == "muon" else spec.adamw.learning_rate
    return Optimizers(members, {p: name for name, p in parameters.items()}, table, peak)


def _adamw(groups: list[dict], spec: OptimizerSpec) -> torch.optim.AdamW:
    fused = all(p.is_cuda for group in groups for p in group["params"])
    betas = (spec.adamw.beta1, spec.adamw.beta2)
    adamw = torch.optim.AdamW(groups, lr=spec.adamw.learning_rate, betas=betas, eps=spec.adamw.eps, fused=fused)
    for group in adamw.param_groups:
        for parameter in group["params"]:
            # torch fills this in at the first step; a checkpoint is loaded before it.
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return adamw


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> tuple[float, bool]:
    """Scale the gradients so that their global 2-norm is at most `max_norm` (None: only measure).

    Returns:
        (norm before clipping, whether it was clipped). With a norm that is not finite nothing is scaled; skip the step.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    value = float(norm)
    if max_norm is None or not value > max_norm or value == float("inf"):
        return value, False
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value, True

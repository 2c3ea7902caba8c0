"""What a budget of `yaongi budget` buys: any two of parameters, tokens and compute give the third."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from manifests.spec import JobSpec, load_job, preset_names
from trainer.arithmetic.flops import flops_per_token
from trainer.arithmetic.gpus import GPUS, Gpu, by_device, by_option
from trainer.arithmetic.memory import choose_layout, step_memory
from trainer.arithmetic.roofline import of_training
from trainer.arithmetic.scaling import (
    CHANCE,
    CORRECTED,
    FLOPS_PER_PARAMETER,
    Range,
    effective_tokens,
    expected_loss,
    inference_optimum,
)
from trainer.energy import NOMINAL_WATTS
from trainer.errors import SpecError
from trainer.parameters import parameters
from trainer.spec import ParallelSpec

HOUR = 3600
DEFAULT_MFU = 0.4
COMPARED = ("a100", "h100", "h200", "b200")  # GPUs of the table beside those that are asked for


class Priced(NamedTuple):
    """A GPU, and its price of an hour if that is known."""

    gpu: Gpu
    price: float | None

    @classmethod
    def of(cls, text: str) -> Priced:
        """From h100 or h100=2.5.

        Raises:
            SpecError: an unknown GPU, or a price that is no positive number.
        """
        name, has_price, price = text.partition("=")
        gpu = by_option(name)
        try:
            value = float(price) if has_price else None
        except ValueError:
            value = math.nan
        if value is not None and not 0 < value < math.inf:
            raise SpecError(f"--gpu {text}: '{price}' is no price of an hour; write --gpu {gpu.name}=2.50")
        return cls(gpu, value)

    @property
    def watts(self) -> int | None:
        """Nominal; None if it is not known."""
        return next((watts for name, watts in NOMINAL_WATTS.items() if by_device(name) is self.gpu), None)


@dataclass(frozen=True)
class Sized:
    """A model by its sizes; `job` is None for a bare number of parameters, which is thought to be dense."""

    active: float
    total: float
    flops_per_token: float
    job: JobSpec | None = None

    @classmethod
    def dense(cls, params: float) -> Sized:
        return cls(params, params, FLOPS_PER_PARAMETER * params)

    @classmethod
    def of(cls, job: JobSpec) -> Sized:
        found = parameters(job.train.model)
        flops = flops_per_token(job.train.model, job.train.seq_len)
        return cls(sum(p.active for p in found), sum(p.count for p in found), flops, job)

    @property
    def sizes(self) -> tuple[float, ...]:
        """For the law: both ends for a mixture of experts."""
        return (self.active,) if self.active == self.total else (self.active, self.total)


@dataclass(frozen=True)
class Asked:
    """What the user gives; None for what is to be found.

    Attributes:
        unique: different tokens that there are; None: enough, or what the job's sources say.
        served: tokens to be read and written by the finished model.
        num_gpus: that train together.
    """

    model: Sized | None
    tokens: float | None
    gpu_hours: float | None
    money: float | None
    gpus: Sequence[Priced]
    num_gpus: int
    mfu: float = DEFAULT_MFU
    unique: float | None = None
    served: float | None = None


@dataclass(frozen=True)
class Point:
    """A model size and its training tokens under the law."""

    name: str
    params: float
    tokens: float
    loss: float
    flops: float


@dataclass(frozen=True)
class Plan:
    """A run whose three quantities are known."""

    asked: Asked
    model: Sized
    tokens: float
    found: str  # the one that was not given

    @property
    def flops(self) -> float:
        return self.model.flops_per_token * self.tokens

    def gpu_hours(self, gpu: Gpu) -> float:
        return self.flops / (gpu.flops * self.asked.mfu) / HOUR

    @cached_property
    def epochs(self) -> dict[str, float]:
        """Of each source whose size is known; "" is all data of a run without a job."""
        if self.model.job is None or self.asked.unique:
            return {"": self.tokens / self.asked.unique} if self.asked.unique else {}
        job = self.model.job
        wanted = job.data.wanted_tokens(int(self.tokens), job.train.curriculum)
        amounts = {name: source.available_tokens for name, source in job.data.sources.items()}
        return {name: wanted[name] / amount for name, amount in amounts.items() if amount}

    @cached_property
    def effective_tokens(self) -> float:
        """The tokens that the law counts: repeated ones are worth less than fresh ones."""
        if self.asked.unique:
            return effective_tokens(self.asked.unique, self.tokens)
        if self.model.job is None:
            return self.tokens
        job = self.model.job
        wanted = job.data.wanted_tokens(int(self.tokens), job.train.curriculum)
        return sum(
            effective_tokens(job.data.sources[name].available_tokens or math.inf, amount)
            for name, amount in wanted.items()
        )

    @property
    def loss(self) -> Range:
        return expected_loss(self.model.sizes, self.effective_tokens)

    @cached_property
    def points(self) -> list[Point]:
        """The plan as a dense model of its active parameters, and the better ones: for its operations, and for its loss
        if tokens are served too. All tokens are fresh."""
        size, tokens = self.model.active, self.tokens
        flops = FLOPS_PER_PARAMETER * size * tokens
        best = CORRECTED.optimum(flops)
        found = [("this plan", size, tokens), ("compute-optimal: least loss for these operations", *best)]
        if self.asked.served:
            fewest = inference_optimum(size, tokens, self.asked.served)
            found.append(("inference-aware: this loss, fewest operations with serving", *fewest))
        return [Point(name, n, d, CORRECTED.loss(n, d), FLOPS_PER_PARAMETER * n * d) for name, n, d in found]

    @cached_property
    def gpus(self) -> list[Priced]:
        """Those that were asked for, then others to compare with."""
        asked = [each.gpu for each in self.asked.gpus]
        others = [gpu for gpu in GPUS if gpu.name in COMPARED and gpu not in asked]
        return [*self.asked.gpus, *(Priced(gpu, None) for gpu in others)]

    @cached_property
    def bounds(self) -> dict[str, float]:
        """By the names of `gpus`: the MFU that no run of the job can exceed (its roofline). Empty without a job."""
        job = self.model.job
        if job is None or job.train.engine != "yaongi":
            return {}
        spec, found = job.fitted_spec(), {}
        for each in self.gpus:
            with suppress(SpecError):  # FP8 that this GPU has not
                found[each.gpu.name] = of_training(spec, each.gpu, self.asked.num_gpus)[0].mfu
        return found

    @cached_property
    def memory(self) -> list[tuple[int, str, float]]:
        """(GPUs, layout, GiB of the fullest one) for numbers of GPUs up to the plan's, by the job's micro-batch."""
        job = self.model.job
        if job is None or job.train.engine != "yaongi":
            return []
        train, found = job.train, []
        training = job.fitted_spec()
        counts = sorted({2**n for n in range(11) if 2**n < self.asked.num_gpus} | {self.asked.num_gpus})
        for count in counts:
            for data in ("ddp", "fsdp") if count > 1 else ("ddp",):
                parallel = ParallelSpec.model_validate({"data": data})
                per_node = min(count, max(job.cluster.gpus_per_node, 1))
                try:
                    layout = choose_layout(parallel, train.model, train.optimizer, count, per_node, None)
                except SpecError:  # a number of GPUs that nodes do not divide
                    continue
                memory = step_memory(training, layout)
                found.append((count, str(layout), memory.total / 2**30))
        return found

    @property
    def nearest_preset(self) -> str:
        """The preset whose active parameters are closest to the plan's."""
        jobs = {name: Sized.of(load_job(name)) for name in preset_names()}
        return min(jobs, key=lambda name: abs(math.log(jobs[name].active / self.model.active)))


def plan(asked: Asked) -> Plan:
    """Find what is missing.

    Raises:
        SpecError: too little or too much is given, or the budget is impossible.
    """
    _refuse_nonsense(asked)
    found = _solve(asked)
    _refuse_too_little(found)
    return found


def _solve(asked: Asked) -> Plan:
    main = asked.gpus[0]
    hours = asked.gpu_hours
    if asked.money is not None:
        assert main.price is not None
        hours = asked.money / main.price
    if hours is None:
        return _without_compute(asked)
    flops = hours * HOUR * main.gpu.flops * asked.mfu
    if asked.model is not None and asked.tokens is not None:
        raise SpecError(
            "parameters, tokens and compute are all given, and any two give the third; leave out --tokens, --gpu-hours "
            "or --money"
        )
    if asked.model is not None:
        return Plan(asked, asked.model, flops / asked.model.flops_per_token, "tokens")
    if asked.tokens is not None:
        return Plan(asked, Sized.dense(flops / FLOPS_PER_PARAMETER / asked.tokens), asked.tokens, "parameters")
    params, tokens = CORRECTED.optimum(flops)
    return Plan(asked, Sized.dense(params), tokens, "parameters and tokens")


def _without_compute(asked: Asked) -> Plan:
    if asked.model is None and asked.tokens is None:
        raise SpecError("name a job, or give one of --parameters, --tokens, --gpu-hours, --money; two give the third")
    if asked.model is None:
        assert asked.tokens is not None
        return Plan(asked, Sized.dense(CORRECTED.balanced_params(asked.tokens)), asked.tokens, "parameters")
    if asked.tokens is not None:
        return Plan(asked, asked.model, asked.tokens, "compute")
    job = asked.model.job
    if job is None:
        return Plan(asked, asked.model, CORRECTED.balanced_tokens(asked.model.active), "tokens")
    return Plan(asked, asked.model, job.train.steps * job.train.batch.tokens_per_step, "compute")


def _refuse_nonsense(asked: Asked) -> None:
    if not 0 < asked.mfu <= 1:
        raise SpecError(f"--mfu {asked.mfu:g}: the share of a GPU's peak that a run reaches; write 0.4 for 40%")
    if asked.num_gpus < 1:
        raise SpecError(f"--gpus {asked.num_gpus}: at least one GPU trains; write --gpus 8")
    if asked.money is not None and asked.gpu_hours is not None:
        raise SpecError("--gpu-hours and --money both say the compute; leave out one of them")
    if asked.money is not None and asked.gpus[0].price is None:
        name = asked.gpus[0].gpu.name
        raise SpecError(f"--money needs the price of a GPU's hour; write --gpu {name}=2.50")


def _refuse_too_little(found: Plan) -> None:
    job = found.model.job
    if job is not None:
        step = job.train.batch.tokens_per_step
        if found.tokens < step:
            raise SpecError(
                f"{found.tokens:,.0f} tokens: less than one step of the job, {step:,} tokens; give more tokens, hours "
                "or money, or lower train.batch.tokens_per_step"
            )
    elif found.loss.value > CHANCE:
        raise SpecError(
            f"{found.model.active:,.0f} parameters on {found.tokens:,.0f} tokens: too little for any law, by which the "
            f"loss would be {found.loss.value:,.0f} nats and worse than chance; give more, as --tokens 15B"
        )

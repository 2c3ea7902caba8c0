"""Which comparisons with a reference a run relies on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer import parity, precision
from trainer.errors import SpecError
from trainer.fp8 import check as fp8
from trainer.modelspec import ModelSpec
from trainer.ops import OPS, Setting
from trainer.ops.check import compare, device_name
from trainer.ops.setting import VARIANT
from trainer.parity import Record
from trainer.spec import BackendsSpec, Fp8Spec, PrecisionSpec, TrainSpec

DTYPE = {name: dtype for dtype, name in VARIANT.items()}


@dataclass(frozen=True)
class Comparison:
    """One implementation and number format, compared with its reference.

    Attributes:
        op: an operation of `trainer.ops`, or one of FP8.
        backend: its name there; of FP8 the implementation.
        variant: number format; of FP8 the recipe.
    """

    op: str
    backend: str
    variant: str

    @property
    def package(self) -> str:
        """The distribution whose version the record names."""
        if self.op in fp8.OPERATIONS:
            return precision.PACKAGES[self.backend]
        return OPS[self.op].backends[self.backend].package

    def run(self, device: torch.device) -> Record:
        """Compare now; raises whatever a broken kernel raises."""
        if self.op in fp8.OPERATIONS:
            return fp8.compare(self.op, self._fp8(), device)
        return compare(self.op, self.backend, Setting(device, DTYPE[self.variant]))

    def failed(self, problem: str, device: torch.device) -> Record:
        """The record of a comparison without an outcome."""
        return Record(
            op=self.op,
            backend=self.backend,
            variant=self.variant,
            package=self.package,
            version=parity.package_version(self.package) or "unknown",
            torch=parity.package_version("torch") or "unknown",
            device_class=Setting(device).device_class,
            device=device_name(device),
            forward_error=0.0,
            backward_error=0.0,
            leak=0.0,
            tolerance=0.0,
            passed=False,
            problem=problem,
        )

    def _fp8(self) -> Fp8Spec:
        return next(
            options
            for implementation, options in fp8.comparisons(self.op)
            if implementation == self.backend and options.recipe == self.variant
        )

    def __str__(self) -> str:
        return f"{self.op} by {self.backend} in {self.variant}"


def wanted(spec: TrainSpec, device: torch.device) -> list[Comparison]:
    """The comparisons that decide what this run uses on this device, those with a record included."""
    found = _of_operations(spec.backends, device, spec.precision, spec.model)
    return [*found] if spec.model.lora else [*found, *_of_fp8(spec.precision, device)]


def everything(device: torch.device) -> list[Comparison]:
    """The comparisons of all that is installed, in the number formats that `auto` takes on this device."""
    wanted = PrecisionSpec()
    return [*_of_operations(BackendsSpec(), device, wanted, None), *_of_fp8(wanted, device)]


def missing(comparisons: list[Comparison], device: torch.device) -> list[Comparison]:
    """Those without a record, passing or failing, for the installed versions on this class of device."""
    where = Setting(device).device_class
    return [
        c for c in comparisons if not parity.known(c.op, c.backend, c.variant, where, parity.package_version(c.package))
    ]


def _of_operations(
    backends: BackendsSpec, device: torch.device, wanted: PrecisionSpec, model: ModelSpec | None
) -> Iterator[Comparison]:
    try:
        below_fp8 = precision.resolve_for_evaluation(wanted, precision.device_capability(device))
    except SpecError:  # all ranks are told when they agree on the precision
        return
    setting = Setting(device, below_fp8.autocast_dtype or torch.float32, model)
    for op in OPS.values():
        named = getattr(backends, op.name)
        for name, backend in op.backends.items():
            if name != "reference" and named in ("auto", name) and backend.unsupported(setting) is None:
                yield Comparison(op.name, name, setting.variant)


def _of_fp8(wanted: PrecisionSpec, device: torch.device) -> Iterator[Comparison]:
    options, capability = wanted.fp8, precision.device_capability(device)
    if wanted.dtype not in ("auto", "fp8") or capability is None or capability < precision.FP8_CAPABILITY:
        return
    for name in precision.PACKAGES:
        if options.implementation not in ("auto", name):
            continue
        chosen = options.updated({"implementation": name})
        for op in fp8.OPERATIONS:
            covered = (op, name, options.recipe) in ((op, n, o.recipe) for n, o in fp8.comparisons(op))
            if covered and fp8.problem(op, chosen, device) is None:
                yield Comparison(op, name, options.recipe)

"""Which comparisons with a reference a run relies on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from trainer import parity, precision
from trainer.errors import SpecError
from trainer.fp8 import check as fp8
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

    @property
    def is_portable(self) -> bool:
        """Whether nothing but torch's own operators is needed, so that no import can fail."""
        return self.op not in fp8.OPERATIONS and OPS[self.op].backends[self.backend].portable

    def is_recorded(self, device: torch.device) -> bool:
        """Whether it has a record, passing or failing, for the installed versions on this class of device."""
        where, version = Setting(device).device_class, parity.package_version(self.package)
        return bool(parity.known(self.op, self.backend, self.variant, where, version))

    def unsupported(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can. Imports its package, which may end the process."""
        if self.op in fp8.OPERATIONS:
            return fp8.problem(self.op, self._fp8(), device)
        return OPS[self.op].backends[self.backend].unsupported(Setting(device, DTYPE[self.variant]))

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
    """The comparisons that may decide what this run uses on this device. Imports no package."""
    found = _of_operations(spec.backends, device, spec.precision)
    return [*found] if spec.model.lora else [*found, *_of_fp8(spec.precision, device)]


def everything(device: torch.device) -> list[Comparison]:
    """Those of all that could be installed, in the number formats that `auto` takes on this device."""
    wanted = PrecisionSpec()
    return [*_of_operations(BackendsSpec(), device, wanted), *_of_fp8(wanted, device)]


def missing(
    comparisons: list[Comparison], device: torch.device, unsupported: Mapping[str, str | None]
) -> list[Comparison]:
    """Those that a child has to answer: without a record, or of a package that nobody has imported here yet.

    Args:
        unsupported: by comparison, the answer of an earlier child. Where it was a reason, this process can ask, too.
    """

    def is_missing(comparison: Comparison) -> bool:
        if not comparison.is_portable and str(comparison) not in unsupported:
            return True
        return not comparison.is_recorded(device) and comparison.unsupported(device) is None

    return [comparison for comparison in comparisons if is_missing(comparison)]


def _of_operations(backends: BackendsSpec, device: torch.device, wanted: PrecisionSpec) -> Iterator[Comparison]:
    try:
        below_fp8 = precision.resolve_for_evaluation(wanted, precision.device_capability(device))
    except SpecError:  # all ranks are told when they agree on the precision
        return
    variant = VARIANT[below_fp8.autocast_dtype or torch.float32]
    for op in OPS.values():
        named = getattr(backends, op.name)
        for name in op.backends:
            if name != "reference" and named in ("auto", name):
                yield Comparison(op.name, name, variant)


def _of_fp8(wanted: PrecisionSpec, device: torch.device) -> Iterator[Comparison]:
    options, capability = wanted.fp8, precision.device_capability(device)
    if wanted.dtype not in ("auto", "fp8") or capability is None or capability < precision.FP8_CAPABILITY:
        return
    for name in precision.PACKAGES:
        for op in fp8.OPERATIONS if options.implementation in ("auto", name) else ():
            if (name, options.recipe) in ((each, form.recipe) for each, form in fp8.comparisons(op)):
                yield Comparison(op, name, options.recipe)

"""Compare the kernels that are installed here with their references, as a run does where no record is known."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any

from pipelines.doctor.findings import Finding, State
from trainer.errors import first_line


def findings() -> Iterator[Finding]:
    """For each kind of GPU: each comparison, then what a run would take by itself; one line on a machine without."""
    try:
        import torch
    except (ImportError, OSError):  # told by another check
        return
    kinds: dict[str, Any] = {}
    try:
        for index in range(torch.cuda.device_count()):
            kinds.setdefault(torch.cuda.get_device_name(index), torch.device("cuda", index))
    except RuntimeError as error:  # of the driver
        first = (str(error).strip() or "no message").splitlines()[0]
        yield Finding("kernels", "unknown", f"not compared, as the GPUs cannot be asked: {first}")
        return
    if not kinds:
        yield Finding("kernels", "ok", "plain PyTorch, as there is no GPU; on one, each kernel is compared first")
    for device in kinds.values():
        yield from of_device(device)


def of_device(device: Any) -> Iterator[Finding]:
    from trainer.proof.comparisons import everything
    from trainer.proof.prove import Limits
    from trainer.proof.start import of_node, outcome, rely_on

    try:
        proof = of_node(everything(device), device, None, Limits())
    except Exception as error:  # of the driver, torch, a package: doctor has more to tell
        yield Finding("kernels", "unknown", f"not compared on {device}: {first_line(error)}")
        return
    rely_on(proof)
    for comparison in proof.comparisons:
        passed, said = outcome(proof, comparison)
        detail = f"{comparison.variant}, {comparison.package} {_version(comparison.package)}: {said}"
        remedy = f"runs pass over it; try another version of {comparison.package}" if passed is False else ""
        state: State = "unknown" if passed is None else "ok" if passed else "missing"
        yield Finding(f"{comparison.op} by {comparison.backend}", state, detail, remedy)
    for said in proof.known.refused.values():
        yield Finding("kernels", "missing", said, "runs do not import it; install a version that fits torch, or none")
    for problem in proof.problems:
        yield Finding("kernels", "unknown", problem)
    yield from absent(device)
    yield from _taken(device)


def absent(device: Any) -> Iterator[Finding]:
    """Packages that this GPU could use and that are not installed, with what each would compute and the command."""
    from trainer import precision
    from trainer.ops import OPS, Setting
    from trainer.ops.setting import VARIANT
    from trainer.parity import package_version

    used: dict[str, list[str]] = {}
    for op in OPS.values():
        for backend in op.backends.values():
            if backend.offered and package_version(backend.package) is None:
                said = [backend.unsupported(Setting(device, dtype)) for dtype in VARIANT]
                if any(reason and reason.endswith("is not installed") for reason in said):
                    used.setdefault(backend.package, []).append(op.name)
    capability = precision.device_capability(device)
    if capability is not None and capability >= precision.FP8_CAPABILITY:
        for package in precision.PACKAGES.values():
            if package_version(package) is None:
                used.setdefault(package, []).append("products in FP8")
    for package, ops in used.items():
        remedy = f"{install_command(package)}, or take the image that docker/build.sh makes without CPU_ONLY"
        yield Finding(package, "missing", f"not installed; it would compute: {', '.join(ops)}", remedy)


def install_command(package: str) -> str:
    """As the extra `cuda` demands it; kernels are compiled against the torch that is there."""
    name = package.replace("_", "-")
    for requirement in importlib.metadata.requires("yaongi") or []:
        if found := re.match(rf"({name}(\[\w+\])?[<>=~!]\S*?) *; *extra == .cuda", requirement):
            return f"pip install --no-build-isolation '{found[1]}'"
    return f"pip install {name}"


def _taken(device: Any) -> Iterator[Finding]:
    """What `auto` takes; a trial at the start of a run may find another proven one faster."""
    import torch

    from trainer import ops, precision
    from trainer.spec import BackendsSpec, PrecisionSpec

    chosen = precision.resolve(PrecisionSpec(), precision.device_capability(device))
    yield Finding("precision taken", "ok", f"{chosen.name}: {chosen.reason}")
    for op, choice in ops.resolve(BackendsSpec(), device, chosen.autocast_dtype or torch.float32).items():
        yield Finding(f"{op} taken", "ok" if choice.proven else "unknown", f"{choice.name}: {choice.reason}")


def _version(package: str) -> str:
    from trainer import parity

    return parity.package_version(package) or "of unknown version"

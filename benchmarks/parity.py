"""Compare every backend that runs on this machine with its reference, and record the results.

    python benchmarks/parity.py [--device cuda] [--ops ssd,attention] [--write]

Prints one line per operation, backend and number format: the relative errors of outputs and gradients, and the relative
influence of a neighbouring document. With --write they are merged into trainer/ops/parity/<device class>.json; `auto`
uses a kernel on that class of device once the file is committed. Exits with 1 if a comparison fails.
FP8 products (linear, fp8_experts) are compared with their emulation, one line per recipe.
Triton kernels also run on a CPU: TRITON_INTERPRET=1 python benchmarks/parity.py --ops ssd
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from trainer.fp8 import check as fp8
from trainer.ops import OPS, Setting
from trainer.ops.check import compare, variants
from trainer.parity import DIRECTORY, Record, write

OPERATIONS = (*OPS, *fp8.OPERATIONS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--ops", default=",".join(OPERATIONS), help=f"some of {', '.join(OPERATIONS)}")
    parser.add_argument("--write", action="store_true", help="merge the records into --output")
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="directory of the record files")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops.split(",")) - set(OPERATIONS):
        parser.error(f"--ops: no operation {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}")
    device = usable(arguments.device, parser)
    if arguments.write:  # what takes minutes on a GPU must not be lost at its end
        try:
            arguments.output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=arguments.output).close()
        except OSError as error:
            parser.error(f"--output: {arguments.output} cannot be written ({error.strerror}); name another directory")

    records, refused = [], 0
    print(f"{'operation':11} {'backend':14} {'format':8} {'forward':>9} {'backward':>9} {'leak':>9} {'limit':>9}")
    for op in arguments.ops.split(","):
        for backend, outcome in outcomes(op, device):
            if isinstance(outcome, str):
                print(f"{op:11} {backend:14} not here: {outcome}")
                continue
            if isinstance(outcome, Exception):
                print(f"{op:11} {backend:14} FAILED: {str(outcome).partition(chr(10))[0]}")
                refused += 1
                continue
            figures = (outcome.forward_error, outcome.backward_error, outcome.leak, outcome.tolerance)
            verdict = "ok" if outcome.passed else "FAILED"
            print(f"{op:11} {backend:14} {outcome.variant:8}", *(f"{value:9.1e}" for value in figures), verdict)
            records.append(outcome)
    if arguments.write:
        for file in write(records, arguments.output):
            print(f"wrote {file}")
    return 0 if all(record.passed for record in records) and not refused else 1


def usable(name: str, parser: argparse.ArgumentParser) -> torch.device:
    """The device of that name; ends the program if there is none."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        parser.error(f"--device: {name} is none of cpu, cuda, cuda:0, …")
    if kind == "cuda" and int(index or 0) >= (found := torch.cuda.device_count()):
        parser.error(f"--device: no {name}, as torch {torch.__version__} sees {found} GPUs; see nvidia-smi")
    return torch.device(name)


def outcomes(op: str, device: torch.device) -> Iterator[tuple[str, Record | str | Exception]]:
    """Yield a record for each backend and format that runs here, and the reason for each backend or recipe that cannot.

    An exception means that a kernel failed although it declared support; the other comparisons still run.
    """
    if op in fp8.OPERATIONS:
        for implementation, options in fp8.comparisons(op):
            reason = fp8.problem(op, options, device)
            yield (
                implementation,
                f"{options.recipe}: {reason}" if reason else _attempt(fp8.compare, op, options, device),
            )
        return
    for backend in OPS[op].backends:
        if backend == "reference":
            continue
        settings = list(variants(op, backend, device))
        for setting in settings:
            yield backend, _attempt(compare, op, backend, setting)
        if not settings:
            yield backend, OPS[op].backends[backend].unsupported(Setting(device, torch.bfloat16)) or "in no format"


def _attempt(comparison: Callable[..., Record], *arguments: object) -> Record | Exception:
    try:
        return comparison(*arguments)
    except Exception as error:  # RuntimeError of torch, TritonError, ValueError of Transformer Engine, …
        return error


if __name__ == "__main__":
    sys.exit(main())

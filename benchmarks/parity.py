"""Compare every backend that runs on this machine with its reference, and record the outcome.

    python benchmarks/parity.py [--device cuda] [--ops ssd,attention] [--write]

Prints one line for each operation, backend and number format: errors of outputs and gradients and how far a
neighbouring document reached, all relative. With --write they are merged into trainer/ops/parity/<device class>.json;
`auto` uses a kernel on that class of device once the file is committed. Exits with 1 when a comparison failed.
Triton's kernels also run on a CPU: TRITON_INTERPRET=1 python benchmarks/parity.py --ops ssd
"""

import argparse
import sys
from pathlib import Path

import torch

from trainer.ops import OPS, Setting
from trainer.ops.check import compare, variants
from trainer.parity import DIRECTORY, write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", default=",".join(OPS), help=f"some of {', '.join(OPS)}")
    parser.add_argument("--write", action="store_true", help="merge the records into --output")
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="directory of the record files")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops.split(",")) - set(OPS):
        parser.error(f"--ops: no operation {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")

    device = torch.device(arguments.device)
    records = []
    print(f"{'operation':10} {'backend':14} {'format':7} {'forward':>9} {'backward':>9} {'leak':>9} {'limit':>9}")
    for op in arguments.ops.split(","):
        for backend in OPS[op].backends:
            if backend == "reference":
                continue
            settings = list(variants(op, backend, device))
            for setting in settings:
                record = compare(op, backend, setting)
                figures = (record.forward_error, record.backward_error, record.leak, record.tolerance)
                verdict = "ok" if record.passed else "FAILED"
                print(f"{op:10} {backend:14} {record.variant:7}", *(f"{value:9.1e}" for value in figures), verdict)
                records.append(record)
            if not settings:
                print(f"{op:10} {backend:14} not here: {_why_not(op, backend, device)}")
    if arguments.write:
        for file in write(records, arguments.output):
            print(f"wrote {file}")
    return 0 if all(record.passed for record in records) else 1


def _why_not(op: str, backend: str, device: torch.device) -> str | None:
    return OPS[op].backends[backend].unsupported(Setting(device, torch.bfloat16))


if __name__ == "__main__":
    sys.exit(main())

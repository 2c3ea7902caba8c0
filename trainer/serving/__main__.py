"""python -m trainer.serving EXPORT: the server as a process of its own, as in a pod.

Exit code 0 after SIGTERM or SIGINT, if it could serve at all; the others are those of trainer/exitcodes.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from trainer.errors import foreseen
from trainer.exitcodes import ExitCode
from trainer.serving.options import HELP, Device, Options, Weights, prepare

CHOICES = {"device": get_args(Device), "weights": get_args(Weights)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    # PID 1 has no default actions. Until the server listens, nothing has to be finished.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    try:
        options = Options(**vars(parser().parse_args(arguments)))
        prepare()
        from trainer.serving.server import run

        run(options)
    except Exception as error:
        known = foreseen(error)
        if known is None:
            traceback.print_exception(error)
        print(f"error: {known or f'{type(error).__name__}: {error}'}", file=sys.stderr)
        return int(known.code if known else ExitCode.FAULT)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m trainer.serving", description="Serve an exported model.")
    made.add_argument("export", type=Path, metavar="EXPORT", help="folder of an exported model")
    for field in dataclasses.fields(Options):
        if field.name in HELP:
            name, kind, choices = f"--{field.name.replace('_', '-')}", type(field.default), CHOICES.get(field.name)
            text = f"{HELP[field.name]} Default: %(default)s."
            made.add_argument(name, type=kind, choices=choices, default=field.default, help=text)
    return made


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the teardown of torch's threads

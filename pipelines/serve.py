"""`yaongi serve`: an HTTP server with OpenAI's API for an exported model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import Workdir
from pipelines.verify import Export
from trainer.serving.options import HELP, Device, Options, Weights, prepare


def serve(
    source: Export,
    host: Annotated[str, typer.Option(help=HELP["host"])] = Options.host,
    port: Annotated[int, typer.Option(help=HELP["port"])] = Options.port,
    rows: Annotated[int, typer.Option(help=HELP["rows"])] = Options.rows,
    length: Annotated[int, typer.Option(help=HELP["length"])] = Options.length,
    max_waiting: Annotated[int, typer.Option(help=HELP["max_waiting"])] = Options.max_waiting,
    device: Annotated[Device, typer.Option(help=HELP["device"])] = Options.device,
    weights: Annotated[Weights, typer.Option(help=HELP["weights"])] = Options.weights,
    metrics_port: Annotated[int, typer.Option(help=HELP["metrics_port"])] = Options.metrics_port,
    timeout: Annotated[float, typer.Option(help=HELP["timeout"])] = Options.timeout,
    grace: Annotated[float, typer.Option(help=HELP["grace"])] = Options.grace,
    workdir: Workdir = Path("work"),
) -> None:
    """Serve an exported model over HTTP, with OpenAI's API (completions, chat) and streaming.

    Clients must send the key in YAONGI_API_KEY; without it, the server is open.
    """
    options = Options(Path(), host, port, rows, length, max_waiting, device, weights, metrics_port, timeout, grace)
    from pipelines.models import find

    prepare()
    directory = find(source, workdir)
    from trainer.serving.server import run

    run(replace(options, export=directory))

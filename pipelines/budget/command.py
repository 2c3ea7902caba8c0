"""`yaongi budget`: what a training run costs and what it gives, before anything is bought."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import Sets

DEFAULT_GPU = "h100"


def budget(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="A preset's name or a job file, for its model, mix and GPUs.")
    ] = None,
    sets: Sets = None,
    parameters: Annotated[str, typer.Option(help="Instead of a job: those of a dense model, as 1.5B.")] = "",
    tokens: Annotated[str, typer.Option(help="To train on, as 15B or 1T; a job has its own.")] = "",
    gpu_hours: Annotated[str, typer.Option(help="Of the first --gpu, of all of them together.")] = "",
    money: Annotated[str, typer.Option(help="For hours of the first --gpu, in the currency of its price.")] = "",
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME[=PRICE]", help="GPU, and the price of its hour: h100=2.50; repeatable."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that train together; by default the job's, or 1.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the GPU's peak in BF16 that the run reaches.")] = 0.4,
    unique: Annotated[str, typer.Option(help="Different tokens that there are, if they repeat.")] = "",
    serve: Annotated[str, typer.Option(help="Tokens to be served later, for a size that is cheap to serve.")] = "",
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="File for a picture: loss by size for these operations.")] = None,
) -> None:
    """Expected loss, best size, hours, cost, memory: any two of parameters, tokens, and hours or money.

    yaongi budget h100-4b --gpu h100=2.50                     what the preset costs
    yaongi budget h100-4b --tokens 1T --gpus 8                the same model on more tokens
    yaongi budget h100-4b --gpu-hours 2000                    the tokens that it can be trained on
    yaongi budget --tokens 15B --money 5000 --gpu h100=2.50   the size for these tokens and this money
    yaongi budget --gpu-hours 10000 --serve 1T                the best size and tokens
    """
    import json as text

    from rich.console import Console

    from manifests.spec import load_job
    from pipelines.budget import show
    from pipelines.budget.plan import Asked, Priced, Sized, plan
    from trainer.arithmetic.scaling import number
    from trainer.errors import SpecError
    from trainer.specbase import changes_from_sets

    if job and parameters:
        raise SpecError(f"--parameters {parameters}: {job} has its own; leave out one of them")
    if sets and not job:
        raise SpecError("--set changes a field of a job; name one")

    def given(value: str, option: str) -> float | None:
        return number(value, option) if value else None

    size = given(parameters, "--parameters")
    spec = load_job(job, changes_from_sets(sets or [])) if job else None
    model = Sized.of(spec) if spec else None if size is None else Sized.dense(size)
    found = plan(
        Asked(
            model=model,
            tokens=given(tokens, "--tokens"),
            gpu_hours=given(gpu_hours, "--gpu-hours"),
            money=given(money, "--money"),
            gpus=[Priced.of(each) for each in gpu or [DEFAULT_GPU]],
            num_gpus=gpus if gpus is not None else spec.cluster.world_size if spec else 1,
            mfu=mfu,
            unique=given(unique, "--unique"),
            served=given(serve, "--serve"),
        )
    )
    if json:
        print(text.dumps(show.as_json(found), ensure_ascii=False, indent=1))
    else:
        show.show(found, Console())
    if plot is not None:
        show.plot(found, plot)
        if not json:
            print(f"wrote {plot}")

"""The command `yaongi`. Each command imports the heavy packages it needs itself, so that `--help` answers at once."""

from __future__ import annotations

import io
import os
import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from components.running import told
from pipelines import verbs
from pipelines.budget.command import budget
from pipelines.compare import compare
from pipelines.data import app as data_app
from pipelines.doctor.command import doctor
from pipelines.dual.command import dual
from pipelines.lint import lint
from pipelines.onnxverb import onnx
from pipelines.options import Job, Sets, Target, Workdir
from pipelines.prepare import prepare
from pipelines.quantize import Weights, quantize
from pipelines.serve import serve
from pipelines.verify import sign, verify

if TYPE_CHECKING:
    from manifests.spec import JobSpec

EXAMPLES = """
Train a language model from raw text to a verified export: on this machine, or on Kubernetes.

[bold]A first run[/bold], start to end on a CPU in a few minutes:

    yaongi run tiny

[bold]The same with a change[/bold]; any field of the job can be set:

    yaongi run tiny --set train.steps=20 --set data.sources.ko.weight=0.4

[bold]A job of your own[/bold] is a YAML file with a preset and what differs from it:

    preset: tiny
    name: mine
    train: {steps: 500}

    yaongi run mine.yaml

Exit codes: 0 done, 2 bad spec or option, 3 a bug in this program, 65 bad data, 66 corrupt checkpoint, 69 something is
missing or in the way, 72 a gate was not passed, 74 file or volume, 130 and 143 stopped; docs/exit-codes.md lists all.
"""

# In the order in which people need them.
VERBS = (
    *("run", "tune", "prepare", "train", "evaluate", "export", "verify", "sign"),
    *("quantize", "onnx", "generate", "serve"),
    *("local", "dual", "status", "logs", "compare", "stop", "resume"),
    *("describe", "presets", "budget", "data", "doctor", "submit", "compile", "render", "lint", "why"),
)


class InOrder(TyperGroup):
    """Lists the verbs in the order of VERBS."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=VERBS.index)


app = typer.Typer(
    cls=InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=EXAMPLES,
)

app.add_typer(data_app, name="data")
verbs.register(app)
app.command()(lint)
app.command()(doctor)
for command in (dual, prepare, budget, compare, verify, sign, quantize, onnx, serve):
    app.command()(command)


def _be_verbose(on: bool) -> None:
    if on:
        os.environ["YAONGI_VERBOSE"] = "1"


class Task(StrEnum):
    """The trainer's tasks."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    EXPORT = "export"


Verbose = Annotated[
    bool, typer.Option("--verbose", callback=_be_verbose, help="Show everything, and the traceback of an error.")
]


def _show_version(on: bool) -> None:
    if on:
        from trainer import __version__

        print(f"yaongi {__version__}")
        raise typer.Exit


@app.callback()
def root(
    verbose: Verbose = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    pass


def _changes(sets: list[str] | None) -> dict[str, Any]:
    from trainer.specbase import changes_from_sets

    return changes_from_sets(sets or [])


@app.command()
def run(
    job: Job,
    sets: Sets = None,
    target: Target = "local",
    workdir: Workdir = Path("work"),
    pid_file: Annotated[
        Path | None, typer.Option(help="Keep the number of this process in a file while it runs.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline from this machine: data, tokenizer, shards, train, evaluate, export, tune, summary."""
    from pipelines.run import run_here

    run_here(job, _changes(sets), target=target, workdir=workdir, sets=sets, pid_file=pid_file)


@app.command()
def tune(
    job: Job,
    sets: Sets = None,
    target: Target = "local",
    workdir: Workdir = Path("work"),
    verbose: Verbose = False,
) -> None:
    """Tune a model on chats: only the job's section `tune`, of its trained run or of the model in `tune.init_from`."""
    from pipelines.run import run_here

    run_here(job, _changes(sets), target=target, workdir=workdir, tuning=True, sets=sets)


@app.command()
def train(job: Job, sets: Sets = None, workdir: Workdir = Path("work"), verbose: Verbose = False) -> None:
    """Run only the trainer on this machine, for a job whose shards exist or for a TrainSpec file."""
    _stage("train", job, sets, workdir)


@app.command()
def evaluate(job: Job, sets: Sets = None, workdir: Workdir = Path("work"), verbose: Verbose = False) -> None:
    """Measure a run's last checkpoint on held-out text, and on the benchmarks in train.evaluate; generate samples."""
    _stage("evaluate", job, sets, workdir)


@app.command()
def export(job: Job, sets: Sets = None, workdir: Workdir = Path("work"), verbose: Verbose = False) -> None:
    """Write a run's last checkpoint as safetensors with config and tokenizer."""
    _stage("export", job, sets, workdir)


def _stage(task: Any, job: str, sets: list[str] | None, workdir: Path) -> None:
    from components.launch import step
    from pipelines import made
    from pipelines.background import driving
    from pipelines.options import command
    from pipelines.run import local_job
    from trainer.specbase import read_yaml

    if Path(job).is_file() and "run_dir" in read_yaml(job):
        # The number of processes is in torchrun's own variable; a job's spec states it itself.
        step.run_file(task, job, int(os.environ.get("PET_NPROC_PER_NODE", "1")), sets or [])
        return
    changes = _changes(sets)
    spec, _ = local_job(job, changes, target="local", workdir=workdir)
    if task == "train":  # a missing input must not leave a run behind
        made.stage("shards", spec, job, sets, workdir)
        made.stage("tokenizers", spec, job, sets, workdir)
    with driving(spec, workdir) if task == "train" else nullcontext():
        if task == "train":
            from pipelines.ports import refuse_taken, written

            refuse_taken(spec, written(job, changes))
        result = step.run(spec, task, train_with=command("run", job, workdir, sets))
    print(f"{task}: {result.path} (digest {result.digest[:12]})")


@app.command()
def generate(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A job, a run's name or directory, or an export.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeatable.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest with this probability together.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from those with this share of the likeliest's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: against tokens that have occurred.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="String at which a text ends; repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask each prompt as a question, for a tuned model.")] = False,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Let multi-token prediction propose tokens; with --temperature 0.")
    ] = False,
    weights: Annotated[
        Weights, typer.Option(help="How weights are held; auto: as stored, FP32 as BF16 on a GPU that has it.")
    ] = Weights.AUTO,
    seed: int = 0,
    workdir: Workdir = Path("work"),
    verbose: Verbose = False,
) -> None:
    """Continue texts with a trained model, or ask it. Texts go to stdout, what they took to stderr."""
    from pipelines.models import find

    directory = find(source, workdir)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in trainer/__main__.py, for the same reason
    from pipelines.generate import generate as write
    from trainer.errors import SpecError
    from trainer.inference.sampling import Sampling

    if speculate and temperature:
        raise SpecError("--speculate proposes tokens for greedy texts only; add --temperature 0")
    sampling = Sampling(tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()))
    write(directory, prompt, sampling, chat=chat, drafts=speculate, weights=weights.value)


@app.command()
def presets() -> None:
    """List the presets."""
    from manifests.spec import load_job, preset_names

    for name in preset_names():
        spec = load_job(name)
        model = spec.train.model
        print(f"{name:22}{len(model.layers):4} layers, hidden {model.hidden}, {spec.train.steps} steps")


@app.command()
def describe(
    job: Job,
    sets: Sets = None,
    optimizers: Annotated[
        bool, typer.Option("--optimizers", help="Only which optimizer trains each parameter.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Only which weights would use FP8, and why.")] = False,
    gpu: Annotated[
        str, typer.Option("--gpu", help="Only the shortest time of a step that this GPU allows, by kind: h100, a100, …")
    ] = "",
    verbose: Verbose = False,
) -> None:
    """Show a model layer by layer: shapes, parameters, FLOPs per token, GPU memory, checkpoint size.

    Of a trained model (a folder, or owner/name on the Hugging Face Hub): its layers, and its `train.model` for a job.
    """
    from manifests.spec import load_job
    from pipelines.pretrained import as_section, model_named
    from trainer.errors import SpecError

    if (trained := model_named(job)) is not None:
        if gpu:
            raise SpecError(f"--gpu: {job} is a model, which has no micro-batches; name a job")
        from trainer.arithmetic.describe import describe as describe_model
        from trainer.arithmetic.describe import render as render_description

        render_description(describe_model(trained, 4096), Console())
        print(f"\nFor a job that begins with it:\n\n{as_section(trained)}")
        return
    spec = load_job(job, _changes(sets))  # report a wrong field before PyTorch is loaded
    from manifests.fabric import note
    from manifests.objects import fabric_of
    from trainer.arithmetic.describe import describe as describe_model
    from trainer.arithmetic.describe import render as render_description
    from trainer.arithmetic.describe import render_memory
    from trainer.fp8 import table
    from trainer.optim import rules
    from trainer.parameters import parameters

    model = spec.train.model
    if gpu:
        _render_roofline(spec, gpu)
        return
    if optimizers:
        shapes = [(p.name, p.shape) for p in parameters(model) if not p.frozen]
        print(rules.render(rules.assign(shapes, spec.train.optimizer, model)))
        return
    if fp8:
        recipe = spec.train.precision.fp8
        table.render(table.conversion_table(model, recipe), f"{recipe.recipe} scaling", Console())
        return
    console = Console()
    render_description(describe_model(model, spec.train.seq_len, spec.train.optimizer), console)
    if spec.train.engine == "megatron":
        from trainer.megatron.check import check
        from trainer.megatron.memory import step_memory

        training = spec.train_spec()
        mesh = check(training, spec.cluster.world_size)
        render_memory(training, mesh, console, lambda each: step_memory(each, mesh))
        return
    fitted, said = spec.fitted()
    for line in said:
        console.print(line)
    render_memory(fitted, spec.layout(), console)
    if named := fabric_of(spec):
        print(f"\n{note(named)}")


def _render_roofline(spec: JobSpec, gpu: str) -> None:
    from trainer.arithmetic.gpus import by_option
    from trainer.arithmetic.roofline import of_training, render

    found, title = of_training(spec.fitted_spec(), by_option(gpu), spec.cluster.world_size)
    render(found, title, Console())


@app.command()
def render(
    job: Job,
    sets: Sets = None,
    task: Annotated[Task, typer.Option(help="Which of the trainer's tasks.")] = Task.TRAIN,
    trainer_version: Annotated[
        str, typer.Option(help="Kubeflow Trainer of a TrainJob, 2.1 to 2.3; unless told, what all of them take.")
    ] = "",
    verbose: Verbose = False,
) -> None:
    """Print the Kubernetes objects of a job, ready for `kubectl apply -f -`."""
    from manifests.fabric import note
    from manifests.objects import fabric_of
    from manifests.render import job_objects
    from manifests.spec import load_job
    from manifests.trainjob import for_release
    from manifests.yamltext import to_manifest

    spec = load_job(job, _changes(sets))
    objects = job_objects(spec, task.value)
    if trainer_version:
        objects = for_release(objects, trainer_version)
    if task.value == "train" and (named := fabric_of(spec)):
        print("".join(f"# {line}\n" for line in note(named).splitlines()), end="")
    print(to_manifest(objects), end="")


@app.command(name="compile")
def compile_pipeline(
    output: Annotated[Path, typer.Argument(help="File to write; its folder is created.", dir_okay=False)] = Path(
        "pretrain.yaml"
    ),
    verbose: Verbose = False,
) -> None:
    """Compile the pipeline for upload to Kubeflow Pipelines."""
    from pipelines.compile import write

    output.parent.mkdir(parents=True, exist_ok=True)
    write(output)
    print(f"wrote {output}")


@app.command()
def submit(
    job: Job,
    sets: Sets = None,
    host: Annotated[str, typer.Option(envvar="KFP_HOST", help="Address of Kubeflow Pipelines, http://…")] = "",
    image: Annotated[
        str, typer.Option(help="Image of the pipeline's steps; the trainer's is --set cluster.image=…")
    ] = "",
    follow: Annotated[bool, typer.Option(help="Wait for the run to end, showing its steps.")] = True,
    browse: Annotated[bool, typer.Option("--open", help="Open the run's page in a browser.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run the pipeline on Kubeflow Pipelines."""
    from pipelines.submit import submit as submit_run

    submit_run(job, _changes(sets), host=host, image=image, follow=follow, console=Console(), browse=browse)


def main() -> None:
    """Run the command line. An error prints one line on stderr and sets the exit code; a bug adds a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal is not UTF-8; as stderr is already
    try:
        app()
    except Exception as error:
        code, message = told(error, traceback_to=sys.stderr)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()

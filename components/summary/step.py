"""Read a finished run's numbers from its directory, for the summary on the terminal and in the pipeline's UI."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.launch.artefacts import NUMBERS
from manifests.spec import JobSpec
from trainer.checkpoints.checkpoint import latest
from trainer.errors import LaunchError
from trainer.evaluation.scores import Row, rows
from trainer.recording.results import loss_of, read_json


@dataclass(frozen=True)
class RunSummary:
    """Losses in nats per token; quality in bits per byte of held-out text by domain.

    Attributes:
        benchmarks: scores with their standard errors, where benchmarks were asked for.
        loss: the mean of the last `loss_steps` steps.
        before: for each domain, the held-out loss of the model that the run started from, and of the trained model;
            empty for a new model.
        gates: a sentence for each gate that was passed, as all are in a run that was exported.
    """

    name: str
    steps: int
    tokens: int
    loss_first: float
    loss_last: float
    loss: float
    loss_steps: int
    tokens_per_second: float
    seconds: float
    bits_per_byte: dict[str, float]
    before: dict[str, tuple[float, float]]
    checkpoint: Path
    export: Path
    report: Path
    samples: list[tuple[str, str]]
    benchmarks: list[Row] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """The numbers for comparing runs; only finite ones, because JSON, and so Kubeflow Pipelines, has no others."""
        quality = {f"bits_per_byte_{domain}": value for domain, value in self.bits_per_byte.items()}
        numbers = {name: float(getattr(self, name)) for name in (*NUMBERS, "loss")} | quality
        numbers |= {row.name: row.value for row in self.benchmarks}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the summary."""
        quality = "   ".join(f"{domain} {value:.3f}" for domain, value in self.bits_per_byte.items())
        changes = "   ".join(f"{domain} {old:.3f} → {new:.3f}" for domain, (old, new) in self.before.items())
        return [
            ("tokens", f"{self.tokens:,} in {self.steps:,} steps"),
            ("loss", f"{self.loss_first:.3f} → {self.loss:.3f} ({loss_of(self.loss_steps)})"),
            ("bits per byte", quality),
            *([("held-out loss", changes)] if changes else []),
            *(("benchmark", f"{row.task} {row.metric} {row.text}") for row in self.benchmarks),
            *(("gate passed", sentence) for sentence in self.gates),
            ("speed", f"{self.tokens_per_second:,.0f} tokens/s, {self.seconds:.0f} s of training"),
            ("checkpoint", str(self.checkpoint)),
            ("exported model", str(self.export)),
            ("report", str(self.report)),
        ]


def read_run(run_dir: str | Path) -> RunSummary:
    """The summary of a run that has been trained, evaluated and exported.

    Raises:
        LaunchError: one of these has not finished.
    """
    run_dir = Path(run_dir)
    result = read_json(run_dir / "result.json", NUMBERS)
    evaluation = read_json(run_dir / "eval.json", ("domains", "samples"))
    checkpoint = latest(run_dir)
    if result is None or evaluation is None or checkpoint is None:
        missing = "result.json" if result is None else "eval.json" if evaluation is None else "a checkpoint"
        raise LaunchError(f"{run_dir}: {missing} is missing; run the pipeline to its end first")
    # The loss is null if the step was skipped because of non-finite gradients.
    numbers: dict[str, Any] = {name: math.nan if result[name] is None else result[name] for name in NUMBERS}
    loss = result.get("loss", result["loss_last"])  # version 0.1 wrote only the loss of the last step
    return RunSummary(
        name=run_dir.name,
        **numbers,
        loss=math.nan if loss is None else loss,
        loss_steps=result.get("loss_steps", 1),
        bits_per_byte={domain: value["bits_per_byte"] for domain, value in evaluation["domains"].items()},
        before={
            domain: (value["loss"], evaluation["domains"][domain]["loss"])
            for domain, value in evaluation.get("begun_with", {}).get("domains", {}).items()
        },
        checkpoint=checkpoint,
        export=run_dir / "export",
        report=run_dir / "report.html",
        samples=[(sample["prompt"], sample["text"]) for sample in evaluation["samples"]],
        benchmarks=rows(evaluation),
        gates=[gate["sentence"] for gate in evaluation.get("gates", []) if gate["passed"]],
    )


def markdown(run: RunSummary) -> str:
    """The summary as a Markdown page that ends with the samples."""
    table = "".join(f"| {label} | {value} |\n" for label, value in run.rows())
    samples = "".join(f"\n**{prompt}**{text}\n".replace("\n\n", "\n") for prompt, text in run.samples)
    return f"# {run.name}\n\n| | |\n|---|---|\n{table}\n## Samples\n{samples}"


def model_artefact(job: JobSpec, run: RunSummary) -> tuple[str, dict[str, str | float]]:
    """Address and metadata of the exported model; the files are not copied.

    A model on a volume has an address that KServe can serve: pvc://<claim>/<path>.

    Raises:
        LaunchError: there is no export.
    """
    needed = ("checkpoint_digest", "step", "parameters", "sha256", "code_version")
    manifest = read_json(run.export / "manifest.json", needed)
    if manifest is None:
        raise LaunchError(f"{run.export} is missing or unfinished; run the pipeline to its end first")
    address = run.export.as_uri()
    if job.cluster.target == "kubernetes":
        address = f"pvc://{job.storage.checkpoints_pvc}/{run.export.relative_to(job.storage.checkpoints_dir)}"
    licences = sorted({source.licence for source in job.data.sources.values()})
    metadata: dict[str, str | float] = {
        "run": run.name,
        "step": manifest["step"],
        "parameters": manifest["parameters"],
        "framework": "pytorch",
        "format": "safetensors",
        "sha256": manifest["sha256"]["model.safetensors"],
        "checkpoint_digest": manifest["checkpoint_digest"],
        "code_version": manifest["code_version"],
        "data_licences": ", ".join(licences),
    }
    return address, metadata | run.metrics()


def publish(job: JobSpec, report: Any, overview: Any, metrics: Any, model: Any) -> None:
    """Show a run's report, overview, numbers and model as artefacts of Kubeflow Pipelines.

    Args:
        report, overview, metrics, model: output artefacts of a component.

    Raises:
        LaunchError: the run has not finished.
    """
    run = read_run(job.run_dir)
    publish_report(run, report.path)
    Path(overview.path).write_text(markdown(run), encoding="utf-8")
    metrics.metadata.update(run.metrics())
    model.uri, found = model_artefact(job, run)
    model.metadata.update(found)


def publish_report(run: RunSummary, target: str | Path) -> None:
    """Copy the self-contained HTML report to `target`.

    Raises:
        LaunchError: the run has none.
    """
    if not run.report.is_file():
        raise LaunchError(f"{run.report} is missing; run the evaluation again")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.report, target)

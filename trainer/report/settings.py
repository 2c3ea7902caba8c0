"""The hyperparameters and dates of a run for the report, to compare two runs."""

from __future__ import annotations

from pathlib import Path

from trainer.process import restarts
from trainer.report.words import moment
from trainer.spec import TrainSpec


def hyperparameters(spec: TrainSpec, rows_found: int | None = None) -> list[tuple[str, str]]:
    """(name as papers call it, value), in the order in which people ask for them.

    Args:
        rows_found: of a micro-batch, where the spec says auto.
    """
    model, optimizer, batch = spec.model, spec.optimizer, spec.batch
    micro_rows = f"{batch.micro_batch_rows}{f': {rows_found}' if batch.micro_batch_rows == 'auto' else ''}"
    rows = [
        ("layers", " ".join(model.layers)),
        ("hidden, vocabulary", f"{model.hidden:,}, {model.vocab_size:,}"),
        ("sequence length", f"{spec.tokens.seq_len:,} tokens, packing {spec.tokens.packing}"),
        (
            "batch",
            f"{batch.tokens_per_step:,} tokens per step, micro-batches of {micro_rows} rows",
        ),
        ("steps", f"{spec.steps:,} ({spec.steps * batch.tokens_per_step:,} tokens)"),
    ]
    if lora := model.lora:
        rows.append(("LoRA", f"rank {lora.rank}, α {lora.alpha:g}, {lora.named}"))
    elif optimizer.name == "muon":
        muon = optimizer.muon
        rows.append(
            (
                "Muon",
                f"learning rate {muon.learning_rate:g}, momentum {muon.momentum:g}"
                f"{' Nesterov' if muon.nesterov else ''}, "
                f"weight decay {muon.weight_decay:g}, {muon.steps} steps of {muon.coefficients.replace('_', ' ')}"
                + (f", TEON over {muon.teon_layers} layers" if muon.teon_layers > 1 else ""),
            )
        )
    adamw = optimizer.adamw
    rows += [
        (
            "AdamW",
            f"learning rate {adamw.learning_rate:g}, β {adamw.beta1:g} and {adamw.beta2:g}, "
            f"weight decay {adamw.weight_decay:g}",
        ),
        ("schedule", _schedule(spec)),
        ("gradient clipping", "off" if optimizer.clip_norm is None else f"norm {optimizer.clip_norm:g}"),
    ]
    if spec.init_from:
        rows.append(("begun with", spec.begun_with))
    if moe := model.moe:
        rows.append(("experts", f"{moe.num_experts}, of which {moe.top_k} for a token, {moe.expert_width:,} wide"))
    rows += [
        ("precision", spec.precision.dtype),
        ("seeds", f"{spec.seed} for the weights, {spec.tokens.seed} for the order of the data"),
    ]
    return rows


def _schedule(spec: TrainSpec) -> str:
    schedule = spec.schedule
    if schedule.name == "constant":
        return "constant"
    parts = [
        schedule.name.upper() if schedule.name == "wsd" else schedule.name,
        f"warm-up {schedule.warmup_fraction:.3g}",
    ]
    if schedule.name == "wsd":
        parts.append(f"{schedule.decay_shape} decay over the last {schedule.decay_fraction:.3g}")
    return ", ".join([*parts, f"down to {schedule.final_learning_rate:g}"])


def dates(run_dir: Path) -> list[tuple[str, str]]:
    """(event, time in UTC) from the files of the run; events that have not happened are left out."""
    found = [] if (begun := restarts.begun(run_dir)) is None else [("started", begun)]
    for what, name in (
        ("last step", "logs/metrics.jsonl"),
        ("evaluated", "eval.json"),
        ("exported", "export/manifest.json"),
    ):
        if (file := run_dir / name).exists():
            found.append((what, file.stat().st_mtime))
    return [(what, moment(when)) for what, when in found]

"""A run directory with a real checkpoint of an untrained micro model: for tests of evaluation, export and report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import micro
import torch
import torch.distributed.checkpoint as dcp

from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpoint import CheckpointManifest
from trainer.data.manifest import read_manifest
from trainer.data.order import ORDER_VERSION
from trainer.data.plan import Cursor
from trainer.kinds.ngrams import token_classes
from trainer.model.hybrid import HybridModel, build_model
from trainer.spec import TrainSpec


def make_model(spec: TrainSpec) -> HybridModel:
    """Random weights large enough that errors show in the logits, and router biases that are not zero."""
    classes = token_classes(Path(spec.tokens.tokenizer) / "tokenizer.json")
    model = build_model(spec.model, spec.backends, seed=3, token_classes=classes)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for moe in model.moe_sublayers():
            moe.bias_E.copy_(torch.randn(moe.bias_E.shape, generator=generator) * 0.1)
    return model.eval()


def save_checkpoint(spec: TrainSpec, model: HybridModel, step: int) -> CheckpointManifest:
    """Publish a checkpoint as after `step` steps of training, without optimizer state."""
    hidden = checkpoint.unfinished_dir(spec.run_dir, step)
    hidden.mkdir(parents=True)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.save(state, checkpoint_id=hidden, no_dist=True)
    drawn = {"ko": 156 * step, "en": 100 * step}
    stages = {"shards": spec.tokens.shards, "tokenizer": spec.tokens.tokenizer}
    manifest = CheckpointManifest(
        step=step,
        spec=spec.model_dump(mode="json"),
        code_version="test",
        digests={name: read_manifest(directory).digest for name, directory in stages.items()},
        cursor=Cursor(ORDER_VERSION, "made", drawn, dict.fromkeys(drawn, 0)).to_dict(),
        world_size=1,
        scalars={"seconds": 0.5 * step},
        files=checkpoint.describe_files(hidden, [path.name for path in hidden.iterdir()]),
    )
    return checkpoint.read_manifest(checkpoint.publish(spec.run_dir, manifest))


def make_run(
    directory: Path, answers: dict[str, int] | None = None, **changes: object
) -> tuple[TrainSpec, HybridModel]:
    """Data, train.yaml and one checkpoint."""
    micro.make_data(directory / "data", answers=answers)
    spec = micro.micro_spec(directory / "data", directory / "run", **changes)
    micro.write_spec(spec, directory / "run" / "train.yaml")
    model = make_model(spec)
    save_checkpoint(spec, model, 12)
    return spec, model


def write_metrics(spec: TrainSpec, steps: int) -> None:
    """Write logs/metrics.jsonl as training does: a falling loss, one skipped step, unequal sources."""
    lines = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "loss": None if step == 5 else 2 + 3 * math.exp(-step / 50),
            "auxiliary": {"router_balance": 1e-4},
            "grad_norm": 1.5 if step < 4 else 0.5,
            "learning_rate": 2e-3,
            "tokens": 256 * step,
            "tokens_per_second": 1000.0 + step % 7,
            "seconds": 0.25,
            "clipped": step < 4,
            "skipped": "nonfinite" if step == 5 else None,
            "expert_load_max_ratio": 1.25,
            "by_source": {"ko": 156 * step, "en": 100 * step},
        }
        lines.append(json.dumps(line) + "\n")
    path = Path(spec.run_dir) / "logs" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def write_validations(spec: TrainSpec, steps: Iterable[int]) -> Path:
    """Write validation.jsonl as training does: two domains, a text for each prompt; returns its path."""
    lines = []
    for step in steps:
        domains = {"ko": {"bits_per_byte": 1 + 50 / step, "loss": 2.0}, "en": {"bits_per_byte": 2.0, "loss": 3.0}}
        samples = [{"prompt": prompt, "text": f" {step} texts"} for prompt in spec.evaluate.prompts or ["a"]]
        line = {"step": step, "tokens": 256 * step, "domains": domains, "samples": samples, "seconds": 1.5}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path = Path(spec.run_dir) / "validation.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path

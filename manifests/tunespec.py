"""The section `tune` of a JobSpec: supervised tuning on chats, of the job's own trained model or of another one.

It becomes a separate job with the same model, storage and cluster, so that everything that works for a run also works
for a tuned one: checkpoints, resuming, metrics, evaluation, export.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from manifests.dataspec import CHAT, NAME_LENGTH, Name, SourceSpec
from trainer.fields import stored
from trainer.gatespec import GateSpec
from trainer.kinds.base import Count
from trainer.lora import LoraSpec
from trainer.runtimespec import Positive
from trainer.spec import AdamWSpec, BatchSpec, CheckpointSpec, OptimizerSpec, Packing, ScheduleSpec
from trainer.specbase import Spec

SUFFIX = "-tune"
_ORDER = ("curriculum", "skip")  # these refer to the base run's tokens
RATES = {"full": 1e-5, "lora": 2e-4}  # of AdamW


class ChatSource(SourceSpec):
    """A source of conversations, as in `data.sources`; `template` names the column of messages.

    `weight` is relative to the other sources. `loss`: train only on the assistant's messages, or on all.
    """

    template: str | None = f"{{messages:{CHAT}}}"
    domain: Literal["ko", "en", "code", "math"] = "en"
    weight: Positive = 1.0
    loss: Literal["all", "answers"] = "answers"


class TuneSpec(Spec):
    """Supervised tuning (SFT) on chats.

    `init_from`: the model to tune, named as in `train.init_from`; by default the job's own run. `lora` trains only
    adapters, which are merged at export. Fields that are left out are as in `train`, except that the optimizer is AdamW
    with a peak rate of 1e-5 (2e-4 for adapters) without weight decay, and the schedule is a cosine to 0. `prompts` are
    questions whose answers the report shows. `gate` is that of the tuned model (trainer/gatespec.py).
    """

    init_from: Annotated[str, Field(min_length=1)] | None = None
    sources: dict[Name, ChatSource] = Field(min_length=1)
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    steps: Count
    seed: int = 0
    seq_len: Annotated[int, Field(ge=8)] | None = None
    packing: Packing = "best_fit"
    batch: BatchSpec | None = None
    optimizer: OptimizerSpec | None = None
    schedule: ScheduleSpec = ScheduleSpec(name="cosine", warmup_fraction=0.03, final_learning_rate=0.0)
    lora: LoraSpec | None = None
    checkpoint: CheckpointSpec | None = None
    prompts: list[Annotated[str, Field(min_length=1)]] | None = None
    gate: list[GateSpec] = []


def tuning(tune: TuneSpec, job: dict[str, Any], run_name: str) -> dict[str, Any]:
    """The values of the tuning job.

    Args:
        job: the values of the job with the section, without the section itself.
        run_name: the name of the job's own run, which is tuned unless the section names another model.
    """
    left_out = ("begun_with_steps", *_ORDER, "engine", "megatron")  # Megatron's GPT cannot train on answers only
    train = {name: value for name, value in job["train"].items() if name not in left_out}
    if "export" in train:  # its exports during training, and their folder, are those of the job's own run
        train["export"] = {"dtype": train["export"]["dtype"]}
    train |= {
        "steps": tune.steps,
        "seed": tune.seed,
        "init_from": tune.init_from or f"{run_name}@{job['train']['steps']}",  # a longer run is another model
        "packing": tune.packing,
        "optimizer": stored(tune.optimizer or _optimizer("lora" if tune.lora else "full")),
        "schedule": stored(tune.schedule),
    }
    for field in ("seq_len", "batch", "checkpoint"):
        if (given := getattr(tune, field)) is not None:
            train[field] = stored(given)
    if tune.lora:
        train["model"] = train["model"] | {"lora": stored(tune.lora), "mtp": None}
    asked = {"chat": True} | ({} if tune.prompts is None else {"prompts": tune.prompts})
    train["evaluate"] = train.get("evaluate", {}) | asked | {"gate": stored(tune.gate)}
    total = sum(source.weight for source in tune.sources.values())
    sources = {name: source.model_dump(mode="json") for name, source in tune.sources.items()}
    for source in sources.values():
        source["weight"] /= total
    return job | {
        "name": f"{job['name'][: NAME_LENGTH - len(SUFFIX)].rstrip('-')}{SUFFIX}",
        "data": {"sources": sources, "heldout_fraction": tune.heldout_fraction},
        "hygiene": {},
        "train": train,
    }


def _optimizer(how: Literal["full", "lora"]) -> OptimizerSpec:
    return OptimizerSpec(name="adamw", adamw=AdamWSpec(learning_rate=RATES[how], weight_decay=0.0))

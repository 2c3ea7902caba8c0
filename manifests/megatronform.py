"""A job as JSON in Megatron's own words: sections data, model, parallelism and runtime, read as changes of a preset.

    {"설명": "…", "parallelism": {"tensor_model_parallel_size": 4, "nodes": 2}, "runtime": {"train-iters": 1000}, …}

Names are those of Megatron-LM's arguments, with _ or -, besides a few common ones (ALIASES). Descriptions may stand
anywhere: as keys (description, 설명, comment, …, or beginning with _ or //), or around a value: {"value": 4,
"설명": "…"}. Fields below become fields of the job; any other argument of Megatron must be what the job passes anyway.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

from pydantic import Field

from trainer.errors import SpecError
from trainer.kinds.base import Count
from trainer.megatron.arguments import arguments, options, parsed
from trainer.megatron.check import check
from trainer.runtimespec import Positive
from trainer.spec import NonNegative, TrainSpec
from trainer.specbase import Spec, parse

PRESET = "qwen3-30b-a3b-megatron"
MOST_LAYERS, MOST_HEADS = 2000, 65536  # each of them is an item of a list somewhere
_DESCRIPTION = re.compile(
    r"(_|//|#).*|(.*[_\- ])?(description|desc|comment|comments|note|notes|help|설명|주석|비고|메모)", re.IGNORECASE
)
ALIASES = {
    "tensor_parallel": "tensor_model_parallel_size", "tensor_parallel_size": "tensor_model_parallel_size",
    "tp": "tensor_model_parallel_size", "pipeline_parallel": "pipeline_model_parallel_size",
    "pipeline_parallel_size": "pipeline_model_parallel_size", "pp": "pipeline_model_parallel_size",
    "context_parallel": "context_parallel_size", "cp": "context_parallel_size",
    "expert_parallel": "expert_model_parallel_size", "expert_parallel_size": "expert_model_parallel_size",
    "ep": "expert_model_parallel_size", "expert_tensor_parallel": "expert_tensor_parallel_size",
    "etp": "expert_tensor_parallel_size", "data_parallel": "data_parallel_size", "dp": "data_parallel_size",
    "distributed_optimizer": "use_distributed_optimizer", "num_nodes": "nodes", "nnodes": "nodes",
    "nproc_per_node": "gpus_per_node", "num_gpus_per_node": "gpus_per_node", "learning_rate": "lr",
    "min_learning_rate": "min_lr", "warmup_iters": "lr_warmup_iters", "warmup_fraction": "lr_warmup_fraction",
    "train_steps": "train_iters", "iterations": "train_iters", "seq_len": "seq_length", "hidden": "hidden_size",
    "sequence_length": "seq_length", "num_kv_heads": "num_query_groups", "top_k": "moe_router_topk",
    "num_key_value_heads": "num_query_groups", "head_dim": "kv_channels", "rope_theta": "rotary_base",
    "moe_intermediate_size": "moe_ffn_hidden_size", "gradient_clipping": "clip_grad", "fp8": "fp8_format",
    "checkpoint_interval": "save_interval", "train_data_path": "data_path", "hf_model": "init_from",
    "model_name": "init_from", "pretrained_checkpoint": "init_from", "recompute": "recompute_granularity",
}  # fmt: skip


class _Sizes(Spec):
    """May stand in every section."""

    seq_length: Count | None = None
    vocab_size: Count | None = None
    micro_batch_size: Count | None = None
    global_batch_size: Count | None = None
    seed: int | None = None


class DataPart(_Sizes):
    """`data_path`: weights and names of the job's sources by turns, as in "0.3 ko-web 0.7 code-stack-edu"."""

    data_path: str | list[str | float] | None = None
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    heldout_fraction: float | None = None
    num_workers: Count | None = None


class ModelPart(_Sizes):
    """`init_from`: the model whose weights it begins with, as in a job."""

    init_from: str | None = None
    num_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)] | None = None
    hidden_size: Count | None = None
    ffn_hidden_size: Count | None = None
    num_attention_heads: Annotated[int, Field(gt=0, le=MOST_HEADS)] | None = None
    num_query_groups: Annotated[int, Field(gt=0, le=MOST_HEADS)] | None = None
    kv_channels: Count | None = None
    rotary_base: Positive | None = None
    qk_layernorm: bool | None = None
    norm_epsilon: Positive | None = None
    init_method_std: Positive | None = None
    untie_embeddings_and_output_weights: bool | None = None
    num_experts: Count | None = None
    moe_router_topk: Count | None = None
    moe_ffn_hidden_size: Count | None = None
    moe_shared_expert_intermediate_size: Count | None = None
    moe_aux_loss_coeff: NonNegative | None = None


class ParallelismPart(_Sizes):
    tensor_model_parallel_size: Count | None = None
    pipeline_model_parallel_size: Count | None = None
    num_virtual_stages_per_pipeline_rank: Count | None = None
    context_parallel_size: Count | None = None
    expert_model_parallel_size: Count | None = None
    expert_tensor_parallel_size: Count | None = None
    data_parallel_size: Count | None = None
    sequence_parallel: bool | None = None
    use_distributed_optimizer: bool | None = None
    overlap_grad_reduce: bool | None = None
    recompute_granularity: str | None = None
    nodes: Count | None = None
    gpus_per_node: Count | None = None


class RuntimePart(_Sizes):
    """`fp8_format` given: FP8 where the GPUs have it, else BF16; `bf16` alone: BF16."""

    train_iters: Count | None = None
    lr: Positive | None = None
    min_lr: NonNegative | None = None
    lr_warmup_iters: int | None = Field(default=None, ge=0)
    lr_warmup_fraction: NonNegative | None = None
    lr_decay_style: str | None = None
    lr_decay_iters: Count | None = None
    lr_wsd_decay_iters: Count | None = None
    lr_wsd_decay_style: str | None = None
    weight_decay: NonNegative | None = None
    adam_beta1: NonNegative | None = None
    adam_beta2: NonNegative | None = None
    adam_eps: Positive | None = None
    clip_grad: NonNegative | None = None
    bf16: bool | None = None
    fp8_format: str | None = None
    fp8_recipe: str | None = None
    recompute_granularity: str | None = None
    save_interval: Count | None = None
    async_save: bool | None = None
    eval_interval: Count | None = None
    eval_iters: int | None = Field(default=None, ge=0)
    log_interval: Count | None = None
    distributed_timeout_minutes: Count | None = None
    nodes: Count | None = None
    gpus_per_node: Count | None = None
    image: str | None = None
    namespace: str | None = None


PARTS: dict[str, type[_Sizes]] = {
    "data": DataPart,
    "model": ModelPart,
    "parallelism": ParallelismPart,
    "runtime": RuntimePart,
}


class Form(Spec):
    """`name`, `preset`: of the job."""

    name: str | None = None
    preset: str = PRESET
    data: DataPart = DataPart()
    model: ModelPart = ModelPart()
    parallelism: ParallelismPart = ParallelismPart()
    runtime: RuntimePart = RuntimePart()


def is_form(value: dict[str, Any]) -> bool:
    """Whether a file's mapping is a form. A job with a section in the wrong place is none."""
    return "parallelism" in value or (
        not {"model", "runtime"}.isdisjoint(value)
        and {"train", "cluster", "tokenizer"}.isdisjoint(value)
        and value.get("preset", PRESET) == PRESET
    )


def read_form(value: dict[str, Any], where: str = "") -> tuple[Form, dict[str, Any]]:
    """The form, and its other arguments of Megatron by `section.name`.

    Raises:
        SpecError: one line for each field that is unknown or has a wrong value.
    """
    known, others, problems = {}, {}, []
    places: dict[str, tuple[str, Any]] = {}  # by field: where it was given first, and its value
    for key, inner in _without_descriptions(value).items():
        if key not in PARTS or not isinstance(inner, dict):
            known[key] = inner
            continue
        fields = PARTS[key].model_fields
        known[key] = {}
        for written, content in inner.items():
            name = written.lstrip("-").replace("-", "_")
            name = ALIASES.get(name, name)
            place, first = places.setdefault(name, (f"{key}.{written}", content))
            if first != content:
                problems.append(f"{key}.{written}: {content!r}, but {place} is {first!r}; remove one of them")
            elif name in fields:
                known[key][name] = content
            elif not _is_elsewhere(name) and (option := _option(name)) is not None:
                others[f"{key}.{written}"] = (option, content)
            else:
                problems.append(f"{key}.{written}: unknown field; {_nearest(key, name)}")
    prefix = f"{where}: " if where else ""
    if problems:
        raise SpecError("\n".join(prefix + problem for problem in problems))
    return parse(Form, known, where), others


def refuse_other_arguments(spec: TrainSpec, world: int, others: dict[str, tuple[str, Any]], where: str = "") -> None:
    """Compare arguments that have no field with those that the job passes.

    Raises:
        SpecError: one line for each that differs.
    """
    passed = parsed(arguments(spec, check(spec, world), "bf16" if spec.precision.dtype == "bf16" else "fp8"))
    prefix, problems = f"{where}: " if where else "", []
    for field, (option, wanted) in others.items():
        given = passed.get(option)
        if isinstance(wanted, bool):
            agrees = (given is not None) == wanted
        else:
            texts = [str(each) for each in (wanted if isinstance(wanted, list) else [wanted])]
            agrees = given is not None and [_number(each) for each in given] == [_number(each) for each in texts]
        if not agrees:
            shown = "not passed" if given is None else f"passed as {' '.join(given) or 'a flag'}"
            problems.append(f"{prefix}{field}: {wanted!r}, but {option} is {shown}; remove it from the file")
    if problems:
        raise SpecError("\n".join(problems))


def _without_descriptions(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    texts = {str(key): inner for key, inner in value.items()}  # of YAML, keys may be numbers
    kept = {key: _without_descriptions(inner) for key, inner in texts.items() if not _DESCRIPTION.fullmatch(key)}
    return kept["value"] if len(kept) == 1 and "value" in kept else kept


def _option(name: str) -> str | None:
    """The option of an argument's name; a few are written with _ themselves."""
    wanted = name.replace("_", "-")
    return next((option for option in options() if option[2:].replace("_", "-") == wanted), None)


def _is_elsewhere(name: str) -> bool:
    return any(name in part.model_fields for part in PARTS.values())


def _nearest(section: str, name: str) -> str:
    fields: dict[str, str] = {}
    for part in PARTS:
        for field in PARTS[part].model_fields:
            if field not in fields or part == section:
                fields[field] = f"{part}.{field}"
    if name in fields:
        return f"did you mean '{fields[name]}'?"
    arguments_of_megatron = {option[2:].replace("-", "_"): f"{section}.{option[2:]}" for option in options()}
    near = difflib.get_close_matches(name, [*fields, *arguments_of_megatron], n=1, cutoff=0.6)
    if not near:
        return 'it is neither a field nor an argument of Megatron; a description is written as "설명" or "_…"'
    return f"did you mean '{fields.get(near[0]) or arguments_of_megatron[near[0]]}'?"


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

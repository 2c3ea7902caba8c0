"""From a form in Megatron's words (megatronform.py) to the changes of a preset that make the job."""

from __future__ import annotations

import math
from typing import Any

from manifests.megatronform import DataPart, Form, ModelPart
from trainer.errors import SpecError
from trainer.spec import TrainSpec

STYLES = {"WSD": "wsd", "wsd": "wsd", "cosine": "cosine", "linear": "linear", "constant": "constant"}
UNSET = object()  # becomes null in the job, unlike None, which is a field that the form leaves open
RECIPES = {"tensorwise": "current", "delayed": "delayed"}


def changes_by(form: Form, base: TrainSpec, sources: list[str]) -> dict[str, Any]:
    """The fields of a job that the form gives.

    Args:
        base: the training of the preset, for what the form leaves open.
        sources: names of the preset's sources.

    Raises:
        SpecError: a value that no job has.
    """
    parts = (form.data, form.model, form.parallelism, form.runtime)

    def size(name: str) -> Any:
        return next((value for part in parts if (value := getattr(part, name)) is not None), None)

    parallelism, runtime = form.parallelism, form.runtime
    steps = runtime.train_iters or base.steps
    seq_len = size("seq_length") or base.tokens.seq_len
    rows = size("global_batch_size") or base.batch.tokens_per_step // base.tokens.seq_len
    tokens_per_step = rows * seq_len
    vocabulary = size("vocab_size")
    train = {
        "engine": "megatron",
        "steps": runtime.train_iters,
        "seq_len": size("seq_length"),
        "seed": size("seed"),
        "init_from": form.model.init_from,
        "batch": {"tokens_per_step": tokens_per_step, "micro_batch_rows": size("micro_batch_size")},
        "model": _model(form.model, base) | _given(vocab_size=vocabulary),
        "optimizer": _optimizer(form),
        "schedule": _schedule(form, steps),
        "precision": _precision(form),
        "checkpoint": {"every_steps": runtime.save_interval, "asynchronous": runtime.async_save},
        "evaluate": _evaluate(form, tokens_per_step),
        "megatron": {
            "tensor_parallel": parallelism.tensor_model_parallel_size,
            "pipeline_parallel": parallelism.pipeline_model_parallel_size,
            "virtual_pipeline": parallelism.num_virtual_stages_per_pipeline_rank,
            "context_parallel": parallelism.context_parallel_size,
            "expert_parallel": parallelism.expert_model_parallel_size,
            "expert_tensor_parallel": parallelism.expert_tensor_parallel_size,
            "sequence_parallel": parallelism.sequence_parallel,
            "distributed_optimizer": parallelism.use_distributed_optimizer,
            "overlap": parallelism.overlap_grad_reduce,
            "workers": form.data.num_workers,
        },
        "runtime": {
            "activation_checkpointing": parallelism.recompute_granularity or runtime.recompute_granularity,
            "log_every_steps": runtime.log_interval,
            "communication_timeout_seconds": (runtime.distributed_timeout_minutes or 0) * 60 or None,
        },
    }
    cluster = {
        "nodes": parallelism.nodes or runtime.nodes,
        "gpus_per_node": parallelism.gpus_per_node or runtime.gpus_per_node,
        "image": runtime.image,
        "namespace": runtime.namespace,
    }
    tokenizer = {"vocab_size": vocabulary, "from": _tokenizer(form.data)}
    data = {"sources": _sources(form.data, sources), "heldout_fraction": form.data.heldout_fraction}
    made = {"name": form.name, "train": train, "cluster": cluster, "tokenizer": tokenizer, "data": data}
    return dict(_without_none(made))


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _without_none(value: Any) -> Any:
    """Without what was not given."""
    if not isinstance(value, dict):
        return value
    kept = {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return {name: None if inner is UNSET else inner for name, inner in kept.items() if inner != {}}


def _model(part: ModelPart, base: TrainSpec) -> dict[str, Any]:
    attention = _given(
        num_heads=part.num_attention_heads,
        num_kv_heads=part.num_query_groups,
        head_dim=part.kv_channels,
        rope_theta=part.rotary_base,
        qk_norm=part.qk_layernorm,
    )
    experts = _given(
        num_experts=part.num_experts,
        top_k=part.moe_router_topk,
        expert_width=part.moe_ffn_hidden_size,
        shared_width=part.moe_shared_expert_intermediate_size,
        balance_loss_weight=part.moe_aux_loss_coeff,
    )
    made = _given(hidden=part.hidden_size, norm_eps=part.norm_epsilon, init_std=part.init_method_std)
    if part.untie_embeddings_and_output_weights is not None:
        made["tied_embedding"] = not part.untie_embeddings_and_output_weights
    if part.num_layers is not None:
        made["layers"] = [base.model.layers[-1]] * part.num_layers
    if part.ffn_hidden_size is not None and any("-" in layer for layer in base.model.layers):
        made["mlp"] = {"width": part.ffn_hidden_size}
    return made | _given(attention=attention or None, moe=experts or None)


def _optimizer(form: Form) -> dict[str, Any]:
    runtime = form.runtime
    adamw = _given(
        learning_rate=runtime.lr,
        weight_decay=runtime.weight_decay,
        beta1=runtime.adam_beta1,
        beta2=runtime.adam_beta2,
        eps=runtime.adam_eps,
    )
    return _given(adamw=adamw or None, clip_norm=UNSET if runtime.clip_grad == 0 else runtime.clip_grad)


def _schedule(form: Form, steps: int) -> dict[str, Any]:
    runtime = form.runtime
    style = runtime.lr_decay_style
    if style is not None and style not in STYLES:
        raise SpecError(f"runtime.lr_decay_style {style}: write one of WSD, cosine, linear, constant")
    if runtime.lr_decay_iters not in (None, steps):
        raise SpecError(f"runtime.lr_decay_iters {runtime.lr_decay_iters}: the rate falls until train_iters {steps}")
    if runtime.lr_wsd_decay_style == "exponential":
        raise SpecError("runtime.lr_wsd_decay_style exponential: write linear or cosine")
    warmup = runtime.lr_warmup_fraction
    if None not in (warmup, runtime.lr_warmup_iters):
        raise SpecError("runtime.lr_warmup_fraction: lr_warmup_iters is given too; remove one of them")
    if runtime.lr_warmup_iters is not None:
        warmup = runtime.lr_warmup_iters / steps
    return _given(
        name=None if style is None else STYLES[style],
        warmup_fraction=warmup,
        decay_fraction=None if runtime.lr_wsd_decay_iters is None else runtime.lr_wsd_decay_iters / steps,
        decay_shape=runtime.lr_wsd_decay_style,
        final_learning_rate=runtime.min_lr,
    )


def _precision(form: Form) -> dict[str, Any]:
    runtime = form.runtime
    if runtime.bf16 is False:
        raise SpecError("runtime.bf16 false: Megatron is run in BF16, or in FP8 on top of it; write true")
    if runtime.fp8_format is None:
        if runtime.fp8_recipe is not None:
            raise SpecError(f"runtime.fp8_recipe {runtime.fp8_recipe}: write fp8_format hybrid or e4m3 too")
        return {"dtype": "bf16"} if runtime.bf16 else {}
    if runtime.fp8_format not in ("hybrid", "e4m3"):
        raise SpecError(f"runtime.fp8_format {runtime.fp8_format}: write hybrid or e4m3")
    made: dict[str, Any] = {"format": runtime.fp8_format}
    if runtime.fp8_recipe is not None:
        if runtime.fp8_recipe not in RECIPES:
            raise SpecError(f"runtime.fp8_recipe {runtime.fp8_recipe}: write tensorwise or delayed")
        made["recipe"] = RECIPES[runtime.fp8_recipe]
        made |= {"bf16_end_layers": 0} if runtime.fp8_recipe == "delayed" else {}
    return {"dtype": "auto", "fp8": made}


def _evaluate(form: Form, tokens_per_step: int) -> dict[str, Any]:
    runtime = form.runtime
    if runtime.eval_iters == 0:
        return {"every_steps": UNSET}
    if runtime.eval_interval is None:
        if runtime.eval_iters is not None:
            raise SpecError(f"runtime.eval_iters {runtime.eval_iters}: give eval_interval too, or write 0")
        return {}
    return {"every_steps": runtime.eval_interval, "every_max_tokens": (runtime.eval_iters or 1) * tokens_per_step}


def _tokenizer(part: DataPart) -> str | None:
    if part.tokenizer_type not in (None, "NullTokenizer", "HuggingFaceTokenizer"):
        raise SpecError(
            f"data.tokenizer_type {part.tokenizer_type}: the shards hold ids already; name a model's tokenizer in "
            "data.tokenizer_model (owner/name), with tokenizer_type HuggingFaceTokenizer or none"
        )
    return part.tokenizer_model


def _sources(part: DataPart, known: list[str]) -> dict[str, Any]:
    """Weights of the sources that data_path names; the preset's others are removed."""
    if part.data_path is None:
        return {}
    words = part.data_path.split() if isinstance(part.data_path, str) else list(map(str, part.data_path))
    if len(words) == 1:
        words = ["1", *words]
    pairs = list(zip(words[::2], words[1::2], strict=False))
    try:
        weights = {name: float(weight) for weight, name in pairs}
    except ValueError:
        weights = {}
    if len(words) % 2 or not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise SpecError(
            "data.data_path: write weights above 0 and names of sources by turns, as in 0.3 ko-web 0.7 ko-wiki"
        )
    if len(weights) < len(pairs):
        raise SpecError("data.data_path: a source is named twice; give it one weight")
    if unknown := [name for name in weights if name not in known]:
        raise SpecError(
            f"data.data_path: '{unknown[0]}' is no source of the job, and the shards are made from its sources "
            f"({', '.join(known)}); name those, or give others in a job file (data.sources)"
        )
    total = sum(weights.values())
    return {name: {"weight": weights[name] / total} if name in weights else UNSET for name in known}
